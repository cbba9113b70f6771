"""A fixed number of experts per token.

Shapes: T tokens, D hidden, E experts, K experts kept per token.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.arguments import without_autocast
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import Router, RouterDescription


@ROUTERS.register(
    "top_k",
    source="Uni-MoE, arXiv 2405.11273, eq. 4; Shazeer et al., arXiv 1701.06538",
    axis="sparse, token choice, fixed number",
    exact="whole copies",
)
class TopK(Router):
    """Linear router without bias that selects the K best experts of each token.

    1. logits = x W^T in float32, whatever the dtype of the model
    2. "topk_softmax": softmax over the K selected logits (Uni-MoE's code), so the weights sum to 1; with
       K = 1 the weight is exactly 1 and only the balance loss trains the router. "softmax_topk": softmax over
       all experts, then the K best (Uni-MoE's paper, eq. 4; Switch), divided by their sum if ``renormalize``

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        k: experts that each token visits, 1..E.
        gating: softmax over the selected logits (``topk_softmax``), or over all before the selection
            (``softmax_topk``).
        renormalize: for softmax_topk, divide the selected probabilities by their sum.
        init_std: standard deviation of the initial weights.
        null_experts: experts without weights behind the others; visiting one skips computation.

    Raises:
        UserError: ``k`` is not in 1..E, or ``gating`` is not known.
    """

    knobs = ("k",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int = 2,
        gating: Literal["topk_softmax", "softmax_topk"] = "topk_softmax",
        renormalize: bool = True,
        init_std: float = 0.02,
        null_experts: int = 0,
    ):
        super().__init__()
        if null_experts < 0:
            raise UserError(f"moe.router.null_experts is {null_experts}, expected at least 0")
        num_experts += null_experts
        if not 1 <= k <= num_experts:
            raise UserError(f"moe.router.k is {k}, expected 1..{num_experts} (the number of experts)")
        if gating not in ("topk_softmax", "softmax_topk"):
            raise UserError(f"moe.router.gating is {gating!r}, expected topk_softmax or softmax_topk")
        self.num_experts, self.k, self.gating, self.renormalize = num_experts, k, gating, renormalize
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with without_autocast(x_TD):
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

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, self.k, fixed=True)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}, gating={self.gating}, renormalize={self.renormalize}"
