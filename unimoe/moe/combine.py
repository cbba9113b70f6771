"""How the outputs of a token's experts are weighted when they are summed.

Shapes: N (token, expert) pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from unimoe.errors import UserError

from .routing import Routing


def _k_weight(routing: Routing) -> Tensor:
    ones = torch.ones_like(routing.token_N)
    k_T = ones.new_zeros(routing.num_tokens).index_add_(0, routing.token_N, ones)
    return routing.weight_N * k_T[routing.token_N]


COMBINE: dict[str, Callable[[Routing], Tensor]] = {
    "weight": lambda routing: routing.weight_N,
    # k slices of one FFN, each weighted 1/k, then give the FFN back
    "k_weight": _k_weight,
    # plain sum; nothing of the task's gradient reaches the router
    "indicator": lambda routing: torch.ones_like(routing.weight_N),
    # plain sum forward, the weight's gradient backward
    "straight_through": lambda routing: 1 + (routing.weight_N - routing.weight_N.detach()),
}


def combine_weights(mode: str, routing: Routing) -> Tensor:
    """[N] factor of each pair's output: "weight" w, "k_weight" k*w, "indicator" 1, "straight_through" 1 with
    w's gradient."""
    if mode not in COMBINE:
        raise UserError(f"combine is {mode!r}, expected one of {', '.join(COMBINE)}")
    return COMBINE[mode](routing)
