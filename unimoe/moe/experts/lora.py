"""Experts that are low-rank adapters on frozen experts.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, r rank, D = H hidden, I intermediate.
"""

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.lora import Adapters
from unimoe.moe.routing import Routing

from .base import Experts, local
from .swiglu import SwiGLUExperts


class LoRAExperts(Experts):
    """One rank-r adapter per expert on gate_up and down: W_e = W + alpha/r * B_e A_e (arXiv 2106.09685).

    The base is frozen here and stays part of the module as ``base``. Gate and up share their A, since they
    are one matrix in the experts' layout. B starts at zero, so the experts start as their base, bit for bit.
    """

    def __init__(self, base: SwiGLUExperts, rank: int, alpha: float):
        super().__init__()
        if rank < 1:
            raise UserError(f"LoRA experts got rank {rank}, expected at least 1")
        num_experts, hidden, inner = base.down_proj.shape
        self.base = base.requires_grad_(False)
        self.num_experts, self.rank, self.alpha, self.scale = num_experts, rank, alpha, alpha / rank
        # adapters of a half-precision base are trained in float32, as peft does
        weight = base.down_proj
        like = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A_gate_up = nn.Parameter(torch.empty(num_experts, rank, hidden, **like))
        self.lora_B_gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, rank, **like))
        self.lora_A_down = nn.Parameter(torch.empty(num_experts, rank, inner, **like))
        self.lora_B_down = nn.Parameter(torch.empty(num_experts, hidden, rank, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform in +-1/sqrt(inputs) (as peft), B zero; the base is left alone."""
        for A in (self.lora_A_gate_up, self.lora_A_down):
            bound = A.shape[2] ** -0.5
            nn.init.uniform_(A, -bound, bound)
        nn.init.zeros_(self.lora_B_gate_up)
        nn.init.zeros_(self.lora_B_down)

    def forward(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        stacks = (self.lora_A_gate_up, self.lora_B_gate_up, self.lora_A_down, self.lora_B_down)
        return self.base(x_TD, routing, weight_N, Adapters(*map(local, stacks)), self.scale)

    @torch.no_grad()
    def merge(self) -> SwiGLUExperts:
        """Plain experts with W + alpha/r B A folded in, in the base's dtype; the base stays as it is."""
        gate_up, down = self.base.gate_up_proj, self.base.down_proj
        with torch.device("meta"):
            merged = SwiGLUExperts(self.num_experts, down.shape[1], down.shape[2], self.base.act)
        merged.gate_up_proj = nn.Parameter(self._fold(gate_up, self.lora_B_gate_up, self.lora_A_gate_up))
        merged.down_proj = nn.Parameter(self._fold(down, self.lora_B_down, self.lora_A_down))
        return merged

    def _fold(self, weight: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return torch.baddbmm(weight.to(B.dtype), B, A, alpha=self.scale).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, rank={self.rank}, alpha={self.alpha}"
