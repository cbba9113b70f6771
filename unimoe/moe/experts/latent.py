"""Experts that work in a smaller space than the model.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, D = H hidden, L latent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.routing import Routing

from .base import Experts


class LatentExperts(Experts):
    """Two matrices that all experts share bring a token into the latent space and the sum of its experts back
    (LatentMoE, arXiv 2601.18089; NemotronHMoE of transformers).

    down [L, D], up [D, L]; ``inner`` are E experts of width L. Expert weights, and what travels between
    processes, shrink by D / L; the router still reads the whole token.
    """

    indivisible = "share two matrices, which cannot be divided among processes"

    def __init__(self, inner: Experts, hidden_size: int, latent_size: int, init_std: float = 0.02):
        super().__init__()
        if not 1 <= latent_size <= hidden_size:
            raise UserError(f"moe.experts.size is {latent_size}, expected 1..{hidden_size} (the hidden size)")
        self.num_experts, self.inner, self.init_std = inner.num_experts, inner, init_std
        self.down = nn.Parameter(torch.empty(latent_size, hidden_size))
        self.up = nn.Parameter(torch.empty(hidden_size, latent_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The two matrices; the inner experts have their own."""
        for weight in (self.down, self.up):
            nn.init.normal_(weight, std=self.init_std)

    def forward(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        y_TL = self.inner(F.linear(x_TD, self.down.to(x_TD.dtype)), routing, weight_N)
        return F.linear(y_TL, self.up.to(y_TL.dtype))

    def active_parameters(self, visits: float) -> float:
        return self.down.numel() + self.up.numel() + self.inner.active_parameters(visits)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.up.shape[0]}, latent={self.up.shape[1]}"
