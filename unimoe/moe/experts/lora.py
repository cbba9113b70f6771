"""Experts that are low-rank adapters on frozen FFNs.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, r rank, D = H hidden, I intermediate.
"""

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.lora import Adapters, lora_experts, lora_mix, shared_lora_experts
from unimoe.moe.routing import Routing
from unimoe.moe.upcycle.read import read_swiglu

from .base import Experts, local
from .swiglu import SwiGLUExperts


class LoRAExperts(Experts):
    """One rank-r adapter per expert on gate_up and down: W_e = W + alpha/r * B_e A_e (arXiv 2106.09685).

    ``base`` decides what is adapted. SwiGLUExperts: each expert has a base of its own. A dense SwiGLU FFN
    (gate_proj/up_proj/down_proj or gate_up_proj/down_proj): all experts share it (MixLoRA, arXiv 2404.15159),
    and it runs once per token however many experts the token visits. The base is frozen here; it stays part
    of the module as ``base``. Gate and up share their A, since they are one matrix in the experts' layout.

    B starts at zero, so the experts start as their base, to the last bit where each has its own.
    """

    def __init__(self, base: nn.Module, num_experts: int, rank: int, alpha: float):
        super().__init__()
        if rank < 1:
            raise UserError(f"LoRA experts got rank {rank}, expected at least 1")
        if isinstance(base, SwiGLUExperts):
            if base.num_experts != num_experts:
                raise UserError(
                    f"LoRA for {num_experts} experts on a base of {base.num_experts}, expected as many"
                )
            down = base.down_proj
        else:
            down = read_swiglu(base)[1]
        hidden, inner = down.shape[-2:]
        self.base = base.requires_grad_(False)
        self.num_experts, self.rank, self.alpha, self.scale = num_experts, rank, alpha, alpha / rank
        # adapters of a half-precision base are trained in float32, as peft does
        like = {"device": down.device, "dtype": torch.promote_types(down.dtype, torch.float32)}
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

    @property
    def adapters(self) -> Adapters:
        stacks = (self.lora_A_gate_up, self.lora_B_gate_up, self.lora_A_down, self.lora_B_down)
        return Adapters(*map(local, stacks))

    def forward(self, x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor | None = None) -> Tensor:
        if isinstance(self.base, SwiGLUExperts):
            gate_up, down = local(self.base.gate_up_proj), local(self.base.down_proj)
            return lora_experts(x_ND, offsets_E1, gate_up, down, self.adapters, self.scale, weight_N)
        row_N = torch.arange(x_ND.shape[0], device=x_ND.device)
        return self._share(x_ND, row_N, offsets_E1, weight_N)

    def mix(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        if isinstance(self.base, SwiGLUExperts):
            base, routed = (
                (local(self.base.gate_up_proj), local(self.base.down_proj)),
                (routing.token_N, routing.offsets_E1),
            )
            return lora_mix(x_TD, *routed, *base, self.adapters, self.scale, weight_N)
        return self._share(x_TD, routing.token_N, routing.offsets_E1, weight_N)

    def _share(self, x_TD: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor | None) -> Tensor:
        # the two layouts that read_swiglu accepts
        linears = {
            name: linear.weight
            for name, linear in self.base.named_children()
            if isinstance(linear, nn.Linear)
        }
        if "gate_up_proj" in linears:
            gate, up = linears["gate_up_proj"].chunk(2)
        else:
            gate, up = linears["gate_proj"], linears["up_proj"]
        base = (gate, up, linears["down_proj"])
        return shared_lora_experts(x_TD, token_N, offsets_E1, *base, self.adapters, self.scale, weight_N)

    @torch.no_grad()
    def merge(self) -> SwiGLUExperts:
        """Plain experts with W + alpha/r B A folded in, in the base's dtype; the base stays as it is."""
        if isinstance(self.base, SwiGLUExperts):
            gate_up, down = self.base.gate_up_proj, self.base.down_proj
        else:
            gate_up, down = (weight.expand(self.num_experts, -1, -1) for weight in read_swiglu(self.base))
        with torch.device("meta"):
            merged = SwiGLUExperts(self.num_experts, down.shape[1], down.shape[2])
        merged.gate_up_proj = nn.Parameter(self._fold(gate_up, self.lora_B_gate_up, self.lora_A_gate_up))
        merged.down_proj = nn.Parameter(self._fold(down, self.lora_B_down, self.lora_A_down))
        return merged

    def _fold(self, weight: Tensor, B: Tensor, A: Tensor) -> Tensor:
        return torch.baddbmm(weight.to(B.dtype), B, A, alpha=self.scale).to(weight.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, rank={self.rank}, alpha={self.alpha}"
