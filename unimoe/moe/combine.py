"""How the outputs of a token's experts are weighted when they are summed.

Shapes: T tokens, E experts, N (token, expert) pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .parts import COMBINE
from .routing import Routing

Count = Callable[[], Tensor]
"""Computes k, the number of experts that each pair's token visits."""


@COMBINE.register(
    "weight", source="Shazeer et al., arXiv 1701.06538, eq. 1", exact="whole copies, weights sum to 1"
)
def weight(w: Tensor, k: Count, slices: int) -> Tensor:
    """The router weight w."""
    return w


@COMBINE.register(
    "k_weight", source="Dynamic-DINO, arXiv 2507.17436", exact="slices of one copy, equal weights"
)
def k_weight(w: Tensor, k: Count, slices: int) -> Tensor:
    """k w: k slices of one FFN, each weighted 1/k, give the FFN back."""
    return w * k()


@COMBINE.register("slices", source="this package", exact="as many experts of each slice, weights sum to 1")
def slices(w: Tensor, k: Count, slices: int) -> Tensor:
    """w times the number of slices of an FFN, for routers whose k differs from it."""
    return w * slices


@COMBINE.register("indicator", source="Dynamic-DINO, arXiv 2507.17436, eq. 3", exact="all slices of one copy")
def indicator(w: Tensor, k: Count, slices: int) -> Tensor:
    """1: a plain sum; no gradient of the task loss reaches the router."""
    return torch.ones_like(w)


@COMBINE.register("straight_through", source="Bengio et al., arXiv 1308.3432", exact="all slices of one copy")
def straight_through(w: Tensor, k: Count, slices: int) -> Tensor:
    """1 forward, the gradient of w backward."""
    return 1 + (w - w.detach())


@COMBINE.register(
    "one_plus",
    source="Qwen2MoeSparseMoeBlock of Shwai-He/SparseUnifiedModel",
    exact="all slices of one copy, w = 0",
)
def one_plus(w: Tensor, k: Count, slices: int) -> Tensor:
    """1 + w."""
    return 1 + w


def combine_weights(mode: str, routing: Routing, slices: int = 1) -> Tensor:
    """[N] factor of each pair's output.

    Args:
        mode: a name of ``COMBINE``.
        routing: of the pairs.
        slices: experts that each FFN was cut into.

    Raises:
        UserError: ``mode`` is not known.
    """

    def k_N() -> Tensor:
        ones = torch.ones_like(routing.token_N)
        k_T = ones.new_zeros(routing.num_tokens).index_add_(0, routing.token_N, ones)
        return k_T[routing.token_N]

    return COMBINE.find(mode).build(routing.weight_N, k_N, slices)


def combine_dense(mode: str, routing: Routing, slices: int = 1) -> Tensor:
    """The same factors as [T, E], zero where the token does not visit the expert.

    Raises:
        UserError: ``mode`` is not known.
    """
    chosen_TE = routing.chosen()
    factor_TE = COMBINE.find(mode).build(routing.dense(), lambda: chosen_TE.sum(dim=1, keepdim=True), slices)
    return factor_TE.masked_fill(~chosen_TE, 0)
