"""Experts that scale and shift a shared hidden state, and start as the identity.

Shapes: N (token, expert) pairs sorted by expert, E experts, D hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.moe.parts import EXPERTS

from .base import Experts
from .linear import each_expert, width_of


class FiLMExperts(Experts):
    """E feature-wise linear modulations g(x) x + b(x), where g and b are linear layers of the token itself.

    scale [E, D, D] (out, in) and scale_bias [E, D] make g, which starts at 1; shift and shift_bias make b,
    which starts at 0.
    """

    def __init__(self, num_experts: int, hidden_size: int):
        super().__init__()
        self.num_experts = num_experts
        self.scale = nn.Parameter(torch.zeros(num_experts, hidden_size, hidden_size))
        self.scale_bias = nn.Parameter(torch.ones(num_experts, hidden_size))
        self.shift = nn.Parameter(torch.zeros(num_experts, hidden_size, hidden_size))
        self.shift_bias = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward_rows(self, x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> Tensor:
        def modulate(x: Tensor, scale: Tensor, scale_bias: Tensor, shift: Tensor, bias: Tensor) -> Tensor:
            return F.linear(x, scale, scale_bias) * x + F.linear(x, shift, bias)

        stacks = (self.scale, self.scale_bias, self.shift, self.shift_bias)
        return each_expert(modulate, x_ND, offsets_E1, weight_N, *stacks)


@EXPERTS.register(
    "film",
    source="MoFME, arXiv 2312.16610; FiLM, arXiv 1709.07871",
    axis="FiLM",
    healing="experts: they return the token; exact in front of the FFN (unimoe.applications.restoration)",
)
def film_experts(mlps: Sequence[nn.Module], slices: int) -> FiLMExperts:
    """One feature-wise linear modulation for each slice of each FFN, of its width, starting as the identity.

    Args:
        mlps: dense FFNs, of which only the number and the width count.
        slices: experts of each.
    """
    return FiLMExperts(len(mlps) * slices, width_of(mlps[0]))
