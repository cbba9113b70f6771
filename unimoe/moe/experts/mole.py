"""Experts whose first matrices are low-rank products with one factor for a whole group.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, G groups, D = H hidden, I intermediate,
M rank of a product, U (token, group) pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.arguments import one_by_one
from unimoe.kernels.swiglu import GATES, check_gate
from unimoe.moe.routing import Routing

from .base import Experts


class MoLEExperts(Experts):
    """E SwiGLU FFNs without biases with W_gate = A_gate,i B_gate,g and W_up = A_up,i B_up,g for expert i of
    group g; each has its own down matrix (MoLE, arXiv 2503.23100).

    into [G, 2M, D] are the groups' B, out [E, 2I, M] the experts' A, gate rows first in both; down_proj is
    [E, D, I]. Neighbouring experts form a group. B x is computed once for each token of a group.
    """

    indivisible = "share matrices in groups, which cannot be divided among processes"

    def __init__(
        self,
        num_experts: int,
        groups: int,
        hidden_size: int,
        intermediate_size: int,
        rank: int,
        act: str = "silu",
        init_std: float = 0.02,
    ):
        super().__init__()
        if groups < 1 or num_experts % groups:
            raise UserError(f"{num_experts} MoLE experts in {groups} groups, expected a divisor")
        if not 1 <= rank <= hidden_size:
            raise UserError(f"moe.experts.size is {rank}, expected 1..{hidden_size} (the hidden size)")
        check_gate(act)
        self.num_experts, self.groups, self.act, self.init_std = num_experts, groups, act, init_std
        self.into = nn.Parameter(torch.empty(groups, 2 * rank, hidden_size))
        self.out = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, rank))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, std=self.init_std)

    def forward(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        into, out, down = (stack.to(x_TD.dtype) for stack in (self.into, self.out, self.down_proj))
        tokens, group_N = len(x_TD), routing.expert_N // (self.num_experts // self.groups)
        id_U, place_N = torch.unique(group_N * tokens + routing.token_N, return_inverse=True)
        edges_G1 = tokens * torch.arange(self.groups + 1, device=id_U.device)
        offsets_G1, x_UD = torch.searchsorted(id_U, edges_G1), x_TD[id_U % tokens]
        latent_U = one_by_one(lambda x, _, B: F.linear(x, B), x_UD, offsets_G1, [into], None)
        y_ND = one_by_one(self._expert, latent_U[place_N], routing.offsets_E1, [out, down], weight_N)
        return torch.zeros_like(x_TD, dtype=y_ND.dtype).index_add(0, routing.token_N, y_ND)

    def _expert(self, latent: Tensor, weight: Tensor, out: Tensor, down: Tensor) -> Tensor:
        """Rows [n, 2M] of one expert -> [n, D]."""
        gate, up = (F.linear(z, A) for z, A in zip(latent.chunk(2, dim=-1), out.chunk(2), strict=True))
        return F.linear(GATES[self.act](gate) * up * weight, down)

    def active_parameters(self, visits: float) -> float:
        own = (self.out.numel() + self.down_proj.numel()) / self.num_experts
        return visits * own + min(visits, self.groups) * self.into.numel() / self.groups

    def extra_repr(self) -> str:
        groups, rows, hidden = self.into.shape
        return f"experts={self.num_experts}, groups={groups}, hidden={hidden}, rank={rows // 2}"
