import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import HashRouter, MoELayer, SwiGLUExperts, TopK
from unimoe.moe.upcycle.rows import expert_rows, set_expert_rows


def test_other_rows_are_other_experts_before_the_null_ones():
    torch.manual_seed(0)
    layer = MoELayer(TopK(8, 4, 2, null_experts=1, bias="scores"), SwiGLUExperts(4, 8, 12))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    rows = expert_rows(layer)
    assert set(rows) == {"experts.gate_up_proj", "experts.down_proj", "router.weight", "router.bias"}
    assert all(len(tensor) == 4 for tensor in rows.values())
    null_row = layer.router.weight[4].clone()
    set_expert_rows(layer, {name: tensor[[2, 0]] for name, tensor in rows.items()})
    assert (layer.num_experts, layer.router.num_experts, layer.num_null) == (2, 3, 1)
    assert torch.equal(layer.experts.down_proj[0], rows["experts.down_proj"][2])
    assert torch.equal(layer.router.weight[2], null_row)
    assert layer(torch.randn(5, 8)).isfinite().all()


def test_a_table_has_no_rows_of_experts():
    layer = MoELayer(HashRouter(8, 4, 20), SwiGLUExperts(4, 8, 12), layer_index=3)
    layer.router.expert_rows = ()
    with pytest.raises(UserError, match="layer 3: HashRouter has no row for each expert"):
        expert_rows(layer)
