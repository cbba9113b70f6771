"""Experts that are one linear layer, and start at zero.

Shapes: N (token, expert) pairs sorted by expert, E experts, D hidden.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.moe.parts import EXPERTS

from .base import Experts, local


class LinearExperts(Experts):
    """E linear layers with biases: weight [E, D, D] (out, in), bias [E, D], all zero."""

    def __init__(self, num_experts: int, hidden_size: int):
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward_rows(self, x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> Tensor:
        return each_expert(F.linear, x_ND, offsets_E1, weight_N, self.weight, self.bias)


@EXPERTS.register(
    "linear0",
    source="Switch-DiT, arXiv 2403.09176; zero start: the authors' code",
    axis="linear",
    healing="experts: they return zero; exact as the mask 1 + y of a block (unimoe.applications.diffusion)",
)
def linear_experts(mlps: Sequence[nn.Module], slices: int) -> LinearExperts:
    """One linear layer for each slice of each FFN, of the FFN's width, starting at zero.

    Args:
        mlps: dense FFNs, of which only the number and the width count.
        slices: experts of each.
    """
    return LinearExperts(len(mlps) * slices, width_of(mlps[0]))


def each_expert(
    run: Callable[..., Tensor], x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor, *stacks: Tensor
) -> Tensor:
    """[N, D]: ``run(x, *parameters)`` of each expert on its rows, times their weights."""
    each = zip(*(local(stack).to(x_ND.dtype) for stack in stacks), strict=True)
    sizes = offsets_E1.diff().tolist()
    rows = [run(x, *own) for x, own in zip(x_ND.split(sizes), each, strict=True)]
    return torch.cat(rows) * weight_N[:, None]


def width_of(mlp: nn.Module) -> int:
    """D of an FFN of any form."""
    return next(module for module in mlp.modules() if isinstance(module, nn.Linear)).in_features
