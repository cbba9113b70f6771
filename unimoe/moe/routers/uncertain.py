"""A router that asks itself, by dropout, how sure it is.

Shapes: T tokens, D hidden, E experts, K per token, M passes with dropout.
"""

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.kernels.arguments import without_autocast
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import Router, wide_linear
from .select import divide_by_sum
from .top_k import TopK


@ROUTERS.register(
    "uncertain",
    source="MoFME, arXiv 2312.16610, uncertainty-aware router; how r' is used: ours, the paper does not say",
    axis="sparse, token choice, fixed number",
    exact="whole copies",
)
class UncertainRouter(TopK):
    """``top_k`` whose probabilities r are weighted in training by their certainty, by Monte Carlo dropout.

    1. M passes with dropout in front of the router give mean m and covariance C of a token's probabilities
    2. r' = C^-1 (r - m), of length 1: large where r is far from its mean for its spread; no gradient
    3. the K largest r (1 + r') are chosen and divided by their sum; without dropout r' is 0

    Evaluation uses r. Each pass drops the same values for all tokens, so ranks with the same seed draw the
    same masks.

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        k: experts that each token visits, 1..E.
        passes: number of dropout passes, M.
        drop: share of the token's values that a pass drops.
        ridge: is added to the diagonal of C, which is singular: probabilities sum to 1.
        init_std: standard deviation of the initial weights.

    Raises:
        UserError: a setting is out of range.
    """

    knobs = (*Router.knobs, "k")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int = 2,
        passes: int = 5,
        drop: float = 0.1,
        ridge: float = 1e-3,
        init_std: float = 0.02,
    ):
        if passes < 2:
            raise UserError(f"moe.router.passes is {passes}, expected 2 or more")
        if not 0 <= drop < 1:
            raise UserError(f"moe.router.drop is {drop}, expected from 0 to below 1")
        if ridge <= 0:
            raise UserError(f"moe.router.ridge is {ridge}, expected above 0")
        super().__init__(hidden_size, num_experts, k, init_std=init_std)
        self.passes, self.drop, self.ridge = passes, drop, ridge

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with without_autocast(x_TD):
            logits_TE = self.logits(x_TD, ctx)
            probs_TE = logits_TE.softmax(dim=-1)
            choice_TE = probs_TE
            if self.training and self.drop:
                choice_TE = probs_TE * (1 + self.certainty(x_TD, probs_TE))
            kept_TK, index_TK = choice_TE.topk(self.k, dim=-1)
        return Routing.from_topk(index_TK, divide_by_sum(kept_TK), logits_TE, probs_TE, self.num_experts)

    @torch.no_grad()
    def certainty(self, x_TD: Tensor, probs_TE: Tensor) -> Tensor:
        """[T, E] r', rows of length 1; zeros where the passes do not differ from r."""
        mask_MD = (torch.rand(self.passes, x_TD.shape[-1]) >= self.drop).to(x_TD) / (1 - self.drop)
        passes_MTE = wide_linear(x_TD * mask_MD[:, None], self.weight).softmax(dim=-1)
        apart_MTE = passes_MTE - passes_MTE.mean(dim=0)
        cov_TEE = torch.einsum("mte,mtf->tef", apart_MTE, apart_MTE) / (self.passes - 1)
        ridge_EE = self.ridge * torch.eye(self.num_experts, device=cov_TEE.device, dtype=cov_TEE.dtype)
        found_TE = torch.linalg.solve(cov_TEE + ridge_EE, probs_TE - passes_MTE.mean(dim=0))
        return found_TE / found_TE.norm(dim=-1, keepdim=True).clamp(min=1e-12)
