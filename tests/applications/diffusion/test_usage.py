import math

import pytest
import torch

from unimoe.applications.diffusion import usage as subject
from unimoe.applications.diffusion.usage import (
    class_expert_information,
    live_experts,
    overlap_by_distance,
    visits,
)
from unimoe.moe import Context, LayerRecord, TopK


def test_visits_are_counted_by_sample():
    ctx = Context(sample_T=torch.tensor([0, 0, 0, 1, 1]))
    one = LayerRecord(0, TopK(4, 3, 2)(torch.randn(5, 4), ctx), ctx)
    found = visits([one], 2)
    assert found.shape == (2, 1, 3) and found.sum(dim=2).tolist() == [[6], [4]]
    assert found[0, 0].equal(one.routing.chosen()[:3].sum(dim=0).float())
    assert visits([], 2).shape == (2, 0, 0)


def test_information_of_classes_and_experts():
    label_N = torch.tensor([0, 0, 1, 1])
    split = torch.tensor([[4.0, 0, 0], [4, 0, 0], [0, 4, 0], [0, 4, 0]])
    alike = torch.tensor([[2.0, 2, 0]] * 4)
    both = torch.stack([split, alike], dim=1)
    assert class_expert_information(both, label_N) == pytest.approx([math.log(2), 0])
    assert live_experts(both) == [2, 2]


def test_overlap_falls_with_the_distance_of_times():
    time_N = torch.tensor([0.0, 0.1, 0.9, 1.0])
    by_time = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 1]])[:, None]
    assert overlap_by_distance(by_time, time_N) < -0.5
    assert overlap_by_distance(torch.ones(4, 1, 3), time_N) == 0


def test_overlap_of_many_samples_is_that_of_some(monkeypatch):
    torch.manual_seed(0)
    visits_NLE, time_N = torch.rand(9, 2, 3).round(), torch.rand(9)
    some = overlap_by_distance(visits_NLE[::3], time_N[::3])
    monkeypatch.setattr(subject, "PAIRED", 4)
    assert overlap_by_distance(visits_NLE, time_N) == some
