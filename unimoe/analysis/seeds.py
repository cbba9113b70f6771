"""A result over the seeds of one experiment."""

import statistics
from collections.abc import Sequence


def over_seeds(values: Sequence[float | None]) -> dict[str, float | None]:
    """``mean`` and ``std``, the sample standard deviation (divisor n - 1; None for one value); both are None
    without values or where one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "std": None}
    return {"mean": statistics.fmean(known), "std": statistics.stdev(known) if len(known) > 1 else None}
