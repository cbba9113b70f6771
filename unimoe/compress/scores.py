"""How much each expert matters on calibration data.

Shapes: E experts of a layer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unimoe.errors import UserError

from .watch import Stats

Scores = list[Tensor]
"""Scores of the experts [E] of each MoE layer; larger matters more."""


def frequency(count: Tensor) -> Tensor:
    """Tokens that select the expert (Z-code M3, arXiv 2109.10465, section 4.3)."""
    return count


def gate(gate: Tensor) -> Tensor:
    """Sum of the weights that the router gives it (the gate score that EASY-EP compares with)."""
    return gate


def gnorm(gnorm: Tensor) -> Tensor:
    """Sum over its tokens of weight times norm of its output: EASY-EP without the factor of the token."""
    return gnorm


def reap(gnorm: Tensor, count: Tensor) -> Tensor:
    """Mean over its tokens of weight times norm of its output: rare experts are protected (REAP,
    CerebrasResearch/reap, ICLR 2026; the weight is the whole coefficient, as in its code of March 2026)."""
    return gnorm / count.clamp(min=1)


def easy_ep(easy: Tensor) -> Tensor:
    """Sum over its tokens of weight times norm of its output times how much the routed experts together turn
    the residual stream, 1 - cos(x, x + R) (EASY-EP, arXiv 2504.06792, eq. 4 to 7; RUCAIBox/EASYEP)."""
    return easy


HOW: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "easy_ep": (easy_ep, ("easy",)),
    "reap": (reap, ("gnorm", "count")),
    "gnorm": (gnorm, ("gnorm",)),
    "gate": (gate, ("gate",)),
    "frequency": (frequency, ("count",)),
}
"""Name -> function of one layer's statistics, and their names."""


def score(stats: Stats, how: str) -> Scores:
    """
    Raises:
        UserError: another name, or the statistics lack what it needs, or no token was counted.
    """
    if how not in HOW:
        raise UserError(f"--how is {how!r}, expected random or one of {', '.join(HOW)}")
    function, names = HOW[how]
    if missing := [name for name in names if name not in stats.values]:
        raise UserError(
            f"--how {how} needs the statistic {missing[0]!r}; collect it with `unimoe compress stats`"
        )
    if not stats.tokens:
        raise UserError("the statistics hold 0 calibration tokens, expected some")
    return [function(*values) for values in zip(*(stats.values[name] for name in names), strict=True)]


def mixed(domains: Sequence[Scores]) -> Scores:
    """Scores of several domains as one: each domain's of a layer sum to 1 (EASY-EP, section 4.3)."""
    return [sum(one / one.sum().clamp(min=1e-20) for one in layer) for layer in zip(*domains, strict=True)]  # type: ignore[misc]


def random_scores(counts: Sequence[int], seed: int) -> Scores:
    """The floor that every score must beat."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, generator=generator) for count in counts]
