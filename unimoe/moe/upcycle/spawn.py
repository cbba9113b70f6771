"""Experts that start as one FFN with different parts of its weights masked (EvoMoE's expert diversification).

Shapes: E experts, H hidden, I intermediate.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from unimoe.errors import UserError
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.parts import EXPERTS

from .slice import split_experts


@EXPERTS.register(
    "spawn",
    source="EvoMoE, arXiv 2112.14397, section 3.1; reinit: Drop-Upcycling, arXiv 2502.19261",
    axis="FFN",
    exact="mask 0, whole copies",
    healing="masked weights: each expert lacks a part of the FFN",
)
@torch.no_grad()
def spawn(
    mlps: Sequence[nn.Module], slices: int, mask: float = 0.5, fill: Literal["zero", "reinit"] = "zero"
) -> SwiGLUExperts:
    """The experts of :func:`~unimoe.moe.upcycle.slice.split_experts`, each with a random part of its weights
    replaced, so that copies of one FFN differ from the start.

    The paper names no share; its released code has no such step.

    Args:
        mlps: the FFNs.
        slices: of each.
        mask: share of the weights of each expert that are replaced, at least 0 and below 1; Drop-Upcycling
            found 0.5 best.
        fill: what takes their place: ``zero``, or ``reinit``, normal values of the matrix's own standard
            deviation.

    Raises:
        UserError: as of split_experts, or a setting is out of range.
    """
    if not 0 <= mask < 1:
        raise UserError(f"moe.experts.mask is {mask}, expected at least 0 and below 1")
    if fill not in ("zero", "reinit"):
        raise UserError(f"moe.experts.fill is {fill!r}, expected zero or reinit")
    experts = split_experts(mlps, slices)
    for stack in (experts.gate_up_proj, experts.down_proj):
        masked = torch.rand_like(stack) < mask
        new = torch.zeros_like(stack) if fill == "zero" else stack.std() * torch.randn_like(stack)
        stack.copy_(torch.where(masked, new, stack))
    return experts
