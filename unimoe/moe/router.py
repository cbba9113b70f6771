"""Routers: from token features to a Routing.

Shapes: T tokens, D hidden, E experts, K experts kept per token.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError

from .records import Context
from .routing import Routing


class Router(nn.Module):
    """Chooses experts for tokens: ``forward(x_TD, ctx) -> Routing``."""

    num_experts: int

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        raise TypeError(
            f"{type(self).__name__} has no forward: a Router must define forward(x_TD, ctx) -> Routing"
        )


class TopK(Router):
    """Linear router without bias that keeps the K best experts of each token.

    1. logits = x W^T in float32, whatever dtype the model has
    2. "topk_softmax": softmax over the K kept logits (Uni-MoE's code), so the weights sum to 1; with K = 1
       the weight is exactly 1 and only the balance loss trains the router. "softmax_topk": softmax over all
       experts, K best kept (Uni-MoE's paper, eq. 4; Switch), divided by their sum if ``renormalize``
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int,
        gating: Literal["topk_softmax", "softmax_topk"] = "topk_softmax",
        renormalize: bool = True,
        init_std: float = 0.02,
    ):
        super().__init__()
        if not 1 <= k <= num_experts:
            raise UserError(f"top-k router got k = {k}, expected 1..{num_experts} (the number of experts)")
        if gating not in ("topk_softmax", "softmax_topk"):
            raise UserError(f"gating is {gating!r}, expected topk_softmax or softmax_topk")
        self.num_experts, self.k, self.gating, self.renormalize = num_experts, k, gating, renormalize
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            probs_TE = logits_TE.softmax(dim=-1)
            if self.gating == "topk_softmax":
                kept_TK, index_TK = logits_TE.topk(self.k, dim=-1)
                weight_TK = kept_TK.softmax(dim=-1)
            else:
                weight_TK, index_TK = probs_TE.topk(self.k, dim=-1)
                if self.renormalize:
                    weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return Routing.from_topk(index_TK, weight_TK, logits_TE, probs_TE, self.num_experts)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}, gating={self.gating}, renormalize={self.renormalize}"


class OneExpert(Router):
    """Sends every token to one expert, with weight 1: routing by a task that is known."""

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
