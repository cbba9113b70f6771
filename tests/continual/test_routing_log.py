import pytest
import torch

from unimoe.continual.guidance import TYPES, Observation
from unimoe.continual.routing_log import by_block, drift, over_ranks


def test_sums_become_means_of_each_block():
    seen = {
        5: Observation(8, torch.tensor([2.0, 2, 4]), torch.tensor([6.0, 2]), torch.tensor([4.0, 2.5, 8])),
        1: Observation(4, torch.tensor([4.0, 0, 0]), torch.tensor([4.0, 0]), torch.tensor([2.0, 1, 4])),
    }
    log = by_block(over_ranks(seen, torch.device("cpu")), TYPES)
    assert log["blocks"] == [1, 5] and log["mass"] == [[1, 0], [0.75, 0.25]]
    assert log["types"] == {"old": [1, 0.25], "ambiguous": [0, 0.25], "new": [0, 0.5]}
    assert log["target_mean"] == [0.5, 0.5]
    assert log["target_std"] == pytest.approx([0, (2.5 / 8 - 0.25) ** 0.5], abs=1e-5)


def test_the_first_task_has_no_types():
    assert set(by_block({0: Observation(2, mass=torch.tensor([2.0]))}, TYPES)) == {"blocks", "mass"}
    assert by_block({}, TYPES) == {}


def test_drift_is_the_mass_on_later_banks():
    assert drift([[0.5, 0.3, 0.2], [1, 0, 0]], 0) == [0.5, 0]
    assert drift([[0.5, 0.3, 0.2]], 1) == [0.2] and drift([[0.5, 0.3, 0.2]], 2) == [0]
