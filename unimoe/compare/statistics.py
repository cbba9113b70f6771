"""Differences to a baseline that was trained with the same seeds."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t

Verdict = Literal["better", "worse", "cannot tell"]
FEWEST_SEEDS = 3
"""Seeds from which on a verdict is given."""


@dataclass(frozen=True)
class Difference:
    """The mean difference of a loss to that of the baseline over the seeds that both have."""

    seeds: int
    mean: float
    half_width: float | None
    """Half width of the 95 % interval around the mean, t sd / sqrt(n); None for one seed."""
    verdict: Verdict | None
    """None below ``FEWEST_SEEDS`` seeds."""


def paired_difference(losses: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare losses by seed; None where no seed has both.

    The interval is Student's for the mean of paired differences, with n - 1 degrees of freedom. ``better``: a
    lower loss, with the whole interval below zero.
    """
    differences = [losses[seed] - baseline[seed] for seed in sorted(losses.keys() & baseline.keys())]
    count = len(differences)
    if not count:
        return None
    mean = statistics.fmean(differences)
    if count == 1:
        return Difference(count, mean, None, None)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    verdict: Verdict | None = None
    if count >= FEWEST_SEEDS:
        verdict = "cannot tell" if abs(mean) <= half else "better" if mean < 0 else "worse"
    return Difference(count, mean, half, verdict)
