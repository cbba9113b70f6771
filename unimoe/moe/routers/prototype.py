"""A router of prototypes, with an expert of its own for what has no condition.

Shapes: T tokens, D hidden, E experts, R = E - 1 routed ones.
"""

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
    "prototype",
    source="ProMoE, arXiv 2510.24711; scores: the authors' code",
    axis="sparse, token choice, fixed number",
    healing="router and experts: a token's weight is a cosine",
)
class PrototypeRouter(Router):
    """Two steps: tokens of samples without a condition visit the last expert, with weight 1; all others the k
    of the remaining experts whose prototypes have the largest cosine with the token, weighted by it.

    A sample has no condition where ``Context.label_B`` is negative, as in classifier-free guidance. Without
    labels all tokens have one. There is no loss of balance; ``routing_contrastive`` pulls prototypes and
    their tokens together.

    Args:
        hidden_size: D.
        num_experts: experts with weights, the last of which is the unconditional one; at least 2.
        k: experts of a token with a condition, 1..E-1.
        init_std: standard deviation of the initial prototypes.

    Raises:
        UserError: ``k`` is out of range.
    """

    knobs = (*Router.knobs, "k")

    def __init__(self, hidden_size: int, num_experts: int, k: int = 1, init_std: float = 0.02):
        super().__init__()
        if not 1 <= k <= num_experts - 1:
            raise UserError(
                f"moe.router.k is {k}, expected 1..{num_experts - 1} (the experts but the unconditional one)"
            )
        self.num_experts, self.k, self.init_std = num_experts, k, init_std
        self.prototypes = nn.Parameter(torch.empty(num_experts - 1, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prototypes, std=self.init_std)

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with without_autocast(x_TD):
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            prototypes_RD = F.normalize(self.prototypes.to(x_TD.dtype), dim=-1)
            cosine_TR = F.normalize(x_TD, dim=-1) @ prototypes_RD.T
        free_T1 = self._unconditional(len(x_TD), ctx, x_TD.device)[:, None]
        index_TK = cosine_TR.topk(self.k, dim=-1).indices
        chosen_TR = torch.zeros_like(cosine_TR, dtype=torch.bool).scatter(1, index_TK, True)
        chosen_TE = torch.cat([chosen_TR & ~free_T1, free_T1], dim=1)
        logits_TE = torch.cat([cosine_TR, torch.zeros_like(cosine_TR[:, :1])], dim=1)
        weight_TE = torch.where(free_T1, torch.ones_like(logits_TE), logits_TE)
        probs_TE = torch.where(
            free_T1, chosen_TE.to(logits_TE.dtype), F.pad(cosine_TR.softmax(dim=-1), (0, 1))
        )
        routing = Routing.from_mask(chosen_TE, weight_TE, logits_TE, probs_TE)
        routing.extra["token_TD"] = x_TD
        return routing

    @staticmethod
    def _unconditional(tokens: int, ctx: Context, device: torch.device) -> Tensor:
        """[T] bool."""
        if ctx.label_B is None or ctx.sample_T is None:
            return torch.zeros(tokens, dtype=torch.bool, device=device)
        return (ctx.label_B < 0)[ctx.sample_T]

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, self.k, fixed=self.k == 1)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}"
