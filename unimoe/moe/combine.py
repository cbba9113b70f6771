"""How the outputs of a token's experts are weighted when they are summed.

Shapes: T tokens, E experts, N (token, expert) pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unimoe.errors import UserError

from .routing import Routing

COMBINE: dict[str, Callable[[Tensor, Callable[[], Tensor]], Tensor]] = {
    "weight": lambda weight, k: weight,
    # k slices of one FFN, each weighted 1/k, then give the FFN back
    "k_weight": lambda weight, k: weight * k(),
    # plain sum; no gradient of the task loss reaches the router
    "indicator": lambda weight, k: torch.ones_like(weight),
    # plain sum forward, the weight's gradient backward
    "straight_through": lambda weight, k: 1 + (weight - weight.detach()),
}
"""Factor of a pair's output from its router weight and from k, the number of experts its token visits."""


def combine_weights(mode: str, routing: Routing) -> Tensor:
    """[N] factor of each pair's output: "weight" w, "k_weight" k*w, "indicator" 1, "straight_through" 1 with
    w's gradient.

    Raises:
        UserError: ``mode`` is none of these.
    """

    def k_N() -> Tensor:
        ones = torch.ones_like(routing.token_N)
        k_T = ones.new_zeros(routing.num_tokens).index_add_(0, routing.token_N, ones)
        return k_T[routing.token_N]

    return _factor(mode)(routing.weight_N, k_N)


def combine_dense(mode: str, routing: Routing) -> Tensor:
    """The same factors as [T, E], zero where the token does not visit the expert.

    Raises:
        UserError: ``mode`` is not known.
    """
    chosen_TE = routing.chosen()
    factor_TE = _factor(mode)(routing.dense(), lambda: chosen_TE.sum(dim=1, keepdim=True))
    return factor_TE.masked_fill(~chosen_TE, 0)


def _factor(mode: str) -> Callable[[Tensor, Callable[[], Tensor]], Tensor]:
    if mode not in COMBINE:
        raise UserError(f"combine is {mode!r}, expected one of {', '.join(COMBINE)}")
    return COMBINE[mode]
