"""Area under the ROC curve with its interval, and units of experts that carry nothing.

Shapes: R rows, P positive and N negative ones.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from unimoe.training.ranks import range_over_ranks

from .layers import Bank

DEAD = 1e-3
"""A unit is dead if its outputs on all rows are closer together than this."""


@dataclass(frozen=True)
class AUC:
    """Probability that a positive row scores above a negative one; ties count half."""

    value: float
    half_width: float
    """Half width of the 95 % interval over samples of rows."""


def auc(scores: np.ndarray, labels: np.ndarray) -> AUC:
    """The area under the ROC curve, with DeLong's variance (Biometrics 44, 1988).

    Args:
        scores: [R] float.
        labels: [R] bool, at least one of each class.
    """
    positive, negative = scores[labels], scores[~labels]
    # how many of the other class each row beats: its rank among all minus its rank in its own class
    ranks = rankdata(scores)
    above_P = (ranks[labels] - rankdata(positive)) / len(negative)
    below_N = 1 - (ranks[~labels] - rankdata(negative)) / len(positive)
    variance = sum(float(one.var(ddof=1)) / len(one) for one in (above_P, below_N) if len(one) > 1)
    return AUC(float(above_P.mean()), 1.96 * math.sqrt(variance))


class UnitRange:
    """Smallest and largest output of every unit of the banks of experts, while ``watch`` is open."""

    def __init__(self, model: nn.Module):
        self.banks = {name: bank for name, bank in model.named_modules() if isinstance(bank, Bank)}
        self.low: dict[str, Tensor] = {}
        self.high: dict[str, Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        def see(name: str):
            def hook(_: nn.Module, __: object, y_BEH: Tensor) -> None:
                low, high = y_BEH.amin(dim=0), y_BEH.amax(dim=0)
                self.low[name] = torch.minimum(self.low.get(name, low), low)
                self.high[name] = torch.maximum(self.high.get(name, high), high)

            return hook

        handles = [bank.register_forward_hook(see(name)) for name, bank in self.banks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def dead_share(self) -> dict[str, list[float]]:
        """Bank -> share of each expert's units whose output is the same on all rows of all ranks; every rank
        must call it."""
        ranges = {name: range_over_ranks(self.low[name], self.high[name]) for name in self.low}
        return {
            name: (high - low < DEAD).float().mean(dim=1).tolist() for name, (low, high) in ranges.items()
        }
