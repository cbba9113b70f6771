import math

import pytest
import torch

from unimoe.compare.routing import RoutingMeasures, mutual_information
from unimoe.moe import MoELayer, SwiGLUExperts, record
from unimoe.moe.routers.top_k import TopK


def test_mutual_information_of_kind_and_expert():
    assert mutual_information(torch.eye(4)) == pytest.approx(math.log(4))
    assert mutual_information(torch.tensor([[2.0, 6.0], [1.0, 3.0]])) == pytest.approx(0)
    assert mutual_information(torch.zeros(2, 3)) == 0
    one_way = torch.tensor([[1.0, 0.0], [1.0, 2.0]])  # by hand: log(2)/4 + log(2/3)/4 + log(4/3)/2
    expected = math.log(2) / 4 + math.log(2 / 3) / 4 + math.log(4 / 3) / 2
    assert mutual_information(one_way) == pytest.approx(expected)


@pytest.mark.parametrize(("scale", "entropy"), [(100.0, 0.0), (1e-4, 1.0)])
def test_two_kinds_that_have_an_expert_each(scale, entropy):
    layer = MoELayer(TopK(2, 4, 1), SwiGLUExperts(4, 2, 8), layer_index=3)
    with torch.no_grad():
        layer.router.weight.copy_(scale * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]]))
    measures = RoutingMeasures()
    for kind, x_TD in (("prose", torch.tensor([[1.0, 0.0]])), ("digits", torch.tensor([[0.0, 1.0]]))):
        with record() as records:
            layer(x_TD.repeat(3, 1))
        measures.add(records, kind)
    found = measures.summary({3: layer})
    assert found["load"]["layers"] == [3] and found["load"]["digits"] == [[0, 1, 0, 0]]
    assert found["max_over_mean"] == pytest.approx(2) and found["dead"] == 0.5
    assert found["information"] == pytest.approx(math.log(2))
    assert found["entropy"] == pytest.approx(entropy, abs=1e-3)
