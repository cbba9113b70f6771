import math

import pytest
import torch

from unimoe.applications.visits import label_expert_information, live_experts, visits
from unimoe.moe import Context, LayerRecord, TopK


def test_visits_are_counted_by_sample():
    ctx = Context(sample_T=torch.tensor([0, 0, 0, 1, 1]))
    one = LayerRecord(0, TopK(4, 3, 2)(torch.randn(5, 4), ctx), ctx)
    found = visits([one], 2)
    assert found.shape == (2, 1, 3) and found.sum(dim=2).tolist() == [[6], [4]]
    assert found[0, 0].equal(one.routing.chosen()[:3].sum(dim=0).float())
    assert visits([], 2).shape == (2, 0, 0)


def test_information_of_labels_and_experts():
    label_N = torch.tensor([0, 0, 1, 1])
    split = torch.tensor([[4.0, 0, 0], [4, 0, 0], [0, 4, 0], [0, 4, 0]])
    alike = torch.tensor([[2.0, 2, 0]] * 4)
    both = torch.stack([split, alike], dim=1)
    assert label_expert_information(both, label_N) == pytest.approx([math.log(2), 0])
    assert live_experts(both) == [2, 2]
