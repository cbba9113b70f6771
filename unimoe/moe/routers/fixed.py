"""One expert for all tokens.

Shapes: T tokens, D hidden, E experts, K = 1 expert per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import Router, RouterDescription


class FixedExpertRouter(Router):
    """Sends every token to the same expert with weight 1, for tasks or slots that are known."""

    def __init__(self, num_experts: int, expert: int):
        super().__init__()
        if not 0 <= expert < num_experts:
            raise UserError(f"expert {expert} is chosen, expected 0..{num_experts - 1}")
        self.num_experts, self.expert = num_experts, expert

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        return known_expert(torch.full((len(x_TD),), self.expert, device=x_TD.device), x_TD, self.num_experts)

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, 1, fixed=True)


def known_expert(expert_T: Tensor, x_TD: Tensor, num_experts: int) -> Routing:
    """Each token to its expert [T] int64, with weight 1."""
    probs_TE = F.one_hot(expert_T, num_experts).float()
    weight_TK = x_TD.new_ones(len(x_TD), 1)
    return Routing.from_topk(expert_T[:, None], weight_TK, probs_TE.log(), probs_TE, num_experts)
