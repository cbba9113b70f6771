import numpy as np
import pytest
import torch

from unimoe.applications.recommendation.layers import Bank
from unimoe.applications.recommendation.metrics import UnitRange, auc


def test_auc_counts_pairs():
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 9, 60).astype(float), random.random(60) < 0.3  # with ties
    wins_PN = np.array([[(p > n) + (p == n) / 2 for n in scores[~labels]] for p in scores[labels]])
    found = auc(scores, labels)
    assert found.value == pytest.approx(wins_PN.mean())
    variance = sum(wins_PN.mean(axis=axis).var(ddof=1) / wins_PN.shape[1 - axis] for axis in (0, 1))
    assert found.half_width == pytest.approx(1.96 * variance**0.5)
    assert auc(labels.astype(float), labels).value == 1 and auc(-labels.astype(float), labels).value == 0


def test_a_unit_is_dead_where_its_output_never_changes():
    bank = Bank(2, inputs=3, width=4)
    with torch.no_grad():
        bank.biases[0][0, :3] = -100.0  # ReLU never opens
    units = UnitRange(bank)
    for _ in range(2):
        with units.watch():
            bank(torch.randn(8, 3))
    (shares,) = units.dead_share().values()
    assert shares[0] >= 0.75 and shares[1] < 0.75
    bank(torch.full((1, 3), 1e6))
    assert units.dead_share() == {"": shares}, "it watches only inside"
