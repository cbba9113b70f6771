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
        index_TK = torch.full((len(x_TD), 1), self.expert, device=x_TD.device)
        probs_TE = F.one_hot(index_TK[:, 0], self.num_experts).float()
        return Routing.from_topk(
            index_TK, x_TD.new_ones(len(x_TD), 1), probs_TE.log(), probs_TE, self.num_experts
        )

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, 1, fixed=True)
