"""Experts that are overlapping sets of the hidden units of one FFN.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, D hidden, B units of the FFN, R units
of an expert, F = 2D weights that lead into a unit (gate and up).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from unimoe.kernels.swiglu import check_gate, fused_experts
from unimoe.moe.routing import Routing

from .base import Experts


class SubspaceExperts(Experts):
    """E experts carved out of one SwiGLU FFN, gate_up_proj [2, B, D] and down_proj [D, B] (CDSP-MoE, arXiv
    2512.20291).

    Unit b belongs to expert b E // B. ``topology`` [E, E] says how much of expert j's units expert i may use:
    i has the R = B / sqrt(E) units of the largest influence sigmoid(topology[i, owner]), and its output is
    multiplied by their mean influence, the only way by which the task's loss reaches the topology. After each
    step ``conflict_EE`` holds the cosine between the gradients of each two experts on the units that both
    have, for the loss of that name in the next step (the paper's lagged game).
    """

    conflict_EE: Tensor
    indivisible = "share one FFN, which cannot be divided among processes"

    def __init__(self, num_experts: int, gate_up_2BD: Tensor, down_DB: Tensor, act: str = "silu"):
        super().__init__()
        check_gate(act)
        self.num_experts, self.act, units = num_experts, act, down_DB.shape[1]
        self.size = int(units / num_experts**0.5)
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up_2BD), nn.Parameter(down_DB)
        self.topology = nn.Parameter(down_DB.new_empty(num_experts, num_experts, dtype=torch.float32))
        self.register_buffer("conflict_EE", torch.zeros(num_experts, num_experts, device=down_DB.device))
        self._gradient_EBF: Tensor | None = None
        self.reset_topology()

    def reset_topology(self) -> None:
        """1 on the diagonal, elsewhere 0.1 and some noise, as in the authors' code."""
        with torch.no_grad():
            nn.init.normal_(self.topology, 0.1, 0.02).fill_diagonal_(1.0)

    def reset_parameters(self) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.conflict_EE)
        self.reset_topology()

    def units(self) -> tuple[Tensor, Tensor]:
        """[E, R] the units of each expert, ascending, and [E] their mean influence."""
        owner_B = torch.arange(self.down_proj.shape[1], device=self.topology.device)
        influence_EB = self.topology.sigmoid()[:, owner_B * self.num_experts // len(owner_B)]
        order_EB = torch.argsort(influence_EB.detach(), dim=1, descending=True, stable=True)
        units_ER = order_EB[:, : self.size].sort(dim=1).values
        return units_ER, influence_EB.gather(1, units_ER).mean(dim=1)

    def forward(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        units_ER, influence_E = self.units()
        gate_up = self.gate_up_proj[:, units_ER].transpose(0, 1)
        if gate_up.requires_grad:
            gate_up.register_hook(partial(self.keep_gradient, units_ER))
        down = self.down_proj[:, units_ER].transpose(0, 1)
        weight_N = weight_N * influence_E.to(weight_N.dtype)[routing.expert_N]
        stacks = gate_up.flatten(1, 2).contiguous(), down.contiguous()
        return fused_experts(x_TD, routing.offsets_E1, *stacks, weight_N, routing.token_N, self.act)

    @torch.no_grad()
    def keep_gradient(self, units_ER: Tensor, gradient_E2RD: Tensor) -> None:
        """Add the gradient of the experts' gate and up weights to that of the step so far."""
        if self._gradient_EBF is None:
            experts, _, _, width = gradient_E2RD.shape
            self._gradient_EBF = gradient_E2RD.new_zeros(experts, self.down_proj.shape[1], 2 * width)
        rows_ERF = gradient_E2RD.transpose(1, 2).flatten(2)
        self._gradient_EBF.scatter_add_(1, units_ER[:, :, None].expand_as(rows_ERF), rows_ERF)

    @torch.no_grad()
    def after_step(self, across: Callable[[Tensor], Tensor]) -> None:
        if self._gradient_EBF is not None:
            self.conflict_EE.copy_(overlap_cosine(across(self._gradient_EBF)))
            self._gradient_EBF = None

    def active_parameters(self, visits: float) -> float:
        units = self.down_proj.shape[1]
        return 3 * self.down_proj.shape[0] * min(visits * self.size, units) + self.topology.numel()

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, units={self.down_proj.shape[1]}, of each={self.size}"


def overlap_cosine(gradient_EBF: Tensor) -> Tensor:
    """[E, E] cosine of each two experts' gradients on the units where both have one; 0 without any."""
    gradient_EBF = gradient_EBF.float()
    square_EB = gradient_EBF.square().sum(dim=2)
    norm_EE = (square_EB @ (square_EB > 0).float().T).sqrt()  # of i on the units of j
    dot_EE = torch.einsum("ibf,jbf->ij", gradient_EBF, gradient_EBF)
    return dot_EE / (norm_EE * norm_EE.T).clamp(min=1e-20)
