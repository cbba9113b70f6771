import torch

from unimoe.applications.diffusion import usage as subject
from unimoe.applications.diffusion.usage import overlap_by_distance


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
