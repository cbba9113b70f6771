"""Experts for a pool of adjacent layers."""

from collections.abc import Sequence

import torch
from torch import nn

from unimoe.errors import UserError
from unimoe.moe.experts.pool import PooledExperts
from unimoe.moe.parts import EXPERTS

from .slice import split_experts


@EXPERTS.register(
    "pool",
    source="ReXMoE, arXiv 2510.17483",
    axis="FFN",
    exact="router.candidates = copies * slices, and as swiglu",
    healing="the neighbours' experts: they saw other layers' states",
    indivisible=PooledExperts.indivisible,
)
def pooled_experts(
    mlps: Sequence[nn.Module],
    slices: int,
    group: int = 2,
    noise: float = 0.0,
    positions: int = 2,
) -> PooledExperts:
    """The experts of :func:`~unimoe.moe.upcycle.slice.split_experts`, which the other MoE layers of a group
    may visit too. It has no weights of its own, but a router with more rows.

    The pool starts closed if the router's ``candidates`` are the layer's own experts; ``model.anneal`` opens
    it (the paper's progressive scaling routing).

    Args:
        mlps: the FFNs.
        slices: of each.
        group: adjacent MoE layers that share their experts; 2 to 4 in the paper.
        noise: Gaussian noise on each expert's weights, in standard deviations of each weight matrix.
        positions: MoE layers of the model.

    Raises:
        UserError: as of split_experts, or the layers cannot be grouped.
    """
    if positions % group:
        raise UserError(f"moe.experts.group is {group}, expected a divisor of {positions} (the MoE layers)")
    whole = split_experts(mlps, slices, noise)
    own, hidden, inner = whole.down_proj.shape
    with torch.device("meta"):
        experts = PooledExperts(own, hidden, inner, group)
    experts.gate_up_proj, experts.down_proj = whole.gate_up_proj, whole.down_proj
    return experts
