"""Finding the thresholds of :class:`unimoe.compress.skip.Thresholds`: quantiles of the scores, and MoDES's
search along the frontier of what skips enough.

Shapes: L MoE layers, T tokens, K slots of a token, M modalities, V vocabulary, A answer tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

Place = tuple[int, ...]
"""An index into the grid of each threshold."""


def staircase(
    sizes: Sequence[int],
    ratio: Callable[[Place], float],
    cost: Callable[[Place], float],
    wanted: float,
) -> Place | None:
    """The cheapest place of a grid whose ratio is at least ``wanted``.

    MoDES's frontier search (arXiv 2511.15690, algorithm 1): over the last two thresholds, while the first of
    them ascends, the second one descends as far as the ratio allows. Both functions must not fall when an
    index grows; then the result is that of an exhaustive search, with at most the sum of both sizes of calls
    of ``ratio`` and one of ``cost`` for each step of the frontier, for each combination of the others.

    Args:
        sizes: number of values of each threshold, ascending; at least one.
        ratio: share of pairs that is skipped at a place.
        cost: what skipping costs there.
        wanted: least ratio.

    Returns:
        The place, or None if no place skips enough.
    """
    ratio, best = cache(ratio), None
    rows, columns = (1, *sizes)[-2:]
    flat = len(sizes) == 1
    for first in product(*map(range, sizes[:-2])):
        column = columns - 1
        previous = None
        for row in range(rows):

            def at(column: int, row: int = row, first: Place = first) -> Place:
                return (*first, column) if flat else (*first, row, column)

            if ratio(at(column)) < wanted:
                continue
            while column and ratio(at(column - 1)) >= wanted:
                column -= 1
            if column == previous:
                continue  # one row below skips enough at the same column, and costs no more
            previous = column
            found = cost(at(column))
            if best is None or found < best[0]:
                best = found, at(column)
    return None if best is None else best[1]


def grid(score_N: Tensor, size: int, most: float = 1.0) -> list[float]:
    """``size`` ascending thresholds: quantiles of the scores at equal steps from none to ``most`` of them.

    MoDES's own grid, 2 / (1 + exp(-10 (u - 1))), suits the scores of its models only.
    """
    ordered_N = score_N.float().sort().values
    shares = torch.linspace(0, most, size)
    places = (shares * len(ordered_N)).round().long().clamp(max=len(ordered_N))
    last = torch.nextafter(ordered_N[-1:], torch.tensor([torch.inf]))
    return [0.0, *torch.cat([ordered_N, last])[places[1:]].tolist()]


def skip_ratio(scores: Mapping[str, Tensor], tau: Mapping[str, float]) -> float:
    """Share of all pairs whose score is below the threshold of their group of tokens."""
    skipped = sum(float((score_N < tau[name]).sum()) for name, score_N in scores.items())
    return skipped / sum(len(score_N) for score_N in scores.values())


def mean_kl(base_AV: Tensor, changed_AV: Tensor) -> float:
    """Mean over positions of KL(base || changed), from logits, in nats."""
    base_AV, changed_AV = base_AV.float().log_softmax(-1), changed_AV.float().log_softmax(-1)
    return float((base_AV.exp() * (base_AV - changed_AV)).sum(-1).mean())


def layer_factors(kl_L: Sequence[float]) -> list[float]:
    """[L] MoDES's factors (arXiv 2511.15690, eq. 3): each layer's share of the divergences that skipping one
    whole layer causes; rounding below 0 counts as 0."""
    clean = [max(value, 0.0) for value in kl_L]
    total = sum(clean)
    return [value / total if total else 1 / len(clean) for value in clean]
