"""A fixed number of experts per token.

Shapes: T tokens, D hidden, E experts, K experts kept per token.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.arguments import without_autocast
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import RouterDescription, wide_linear
from .select import (
    SCORES,
    BiasedRouter,
    Groups,
    check_groups,
    check_score,
    divide_by_sum,
    keep_groups,
    one_of_each_slice,
    probabilities,
)


@ROUTERS.register(
    "top_k",
    source="Uni-MoE, arXiv 2405.11273, eq. 4; Shazeer et al., arXiv 1701.06538; options: DeepSeek-V3, "
    "arXiv 2412.19437, eq. 12-16",
    axis="sparse, token choice, fixed number",
    exact="whole copies, weights sum to 1; or groups: slices and combine: straight_through",
)
class TopK(BiasedRouter):
    """Linear router without bias that selects the K best experts of each token.

    1. logits = x W^T in float32 or finer, whatever the dtype of the model; scores = softmax, sigmoid or
       sqrt(softplus) of them; the first ``candidates`` experts alone, if given
    2. selection: the K largest scores, with ``bias`` plus a bias that follows the load; only within a token's
       best ``groups``, or as many of each slice of the FFN
    3. weights: the selected scores, divided by their sum if ``renormalize``, times ``scale``. With a softmax,
       "topk_softmax" takes it over the K selected logits (Uni-MoE's code), so the weights sum to 1; with
       K = 1 the weight is exactly 1 and only the balance loss trains the router. "softmax_topk" takes it
       over all experts (Uni-MoE's paper, eq. 4; Switch)

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        k: experts that each token visits, 1..E.
        gating: softmax over the selected logits (``topk_softmax``), or over all before the selection
            (``softmax_topk``). Other scores know no such difference.
        renormalize: divide the selected scores by their sum.
        init_std: standard deviation of the initial weights.
        null_experts: experts without weights behind the others; visiting one skips computation.
        score: ``softmax``, ``sigmoid`` (DeepSeek-V3, GLM-4) or ``sqrt_softplus`` (DeepSeek-V4) of the logits;
            or the ``logits`` themselves, for combine: one_plus.
        bias: what the selection bias of auxiliary-loss-free balancing is added to, ``scores`` (DeepSeek-V3)
            or ``logits``; None: there is none.
        bias_rate: change of that bias in a step.
        groups: groups of neighbouring experts, of which a token chooses (node-limited routing); or
            ``slices``: the token visits k / slices experts at each slice position of the FFN.
        top_groups: groups that a token may visit.
        scale: factor of all weights (DeepSeek's routed_scaling_factor).
        candidates: leading experts that tokens may choose from, the rest are not there yet; 0: all.
        slices: experts that each FFN was cut into.

    Raises:
        UserError: a setting is out of range or not known.
    """

    knobs = (*BiasedRouter.knobs, "k", "bias_rate", "candidates")
    common_knobs = ("candidates",)
    expert_rows = ("weight", "bias")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int = 2,
        gating: Literal["topk_softmax", "softmax_topk"] = "topk_softmax",
        renormalize: bool = True,
        init_std: float = 0.02,
        null_experts: int = 0,
        score: Literal["softmax", "sigmoid", "sqrt_softplus", "logits"] = "softmax",
        bias: Literal["scores", "logits"] | None = None,
        bias_rate: float = 1e-3,
        groups: Groups = None,
        top_groups: int = 1,
        scale: float = 1.0,
        candidates: int = 0,
        slices: int = 1,
    ):
        super().__init__()
        if null_experts < 0:
            raise UserError(f"moe.router.null_experts is {null_experts}, expected at least 0")
        num_experts += null_experts
        if not 1 <= k <= num_experts:
            raise UserError(f"moe.router.k is {k}, expected 1..{num_experts} (the number of experts)")
        if gating not in ("topk_softmax", "softmax_topk"):
            raise UserError(f"moe.router.gating is {gating!r}, expected topk_softmax or softmax_topk")
        if bias not in ("scores", "logits", None):
            raise UserError(f"moe.router.bias is {bias!r}, expected scores, logits or nothing")
        if candidates and (candidates < k or groups is not None or null_experts):
            found = f"moe.router.candidates is {candidates}"
            raise UserError(f"{found}, expected at least k = {k}, and no groups or null experts beside it")
        check_score(score, renormalize)
        check_groups(groups, top_groups, num_experts, slices, null_experts, k)
        self.num_experts, self.k, self.gating, self.renormalize = num_experts, k, gating, renormalize
        self.init_std, self.score, self.scale, self.bias_on = init_std, score, scale, bias
        self.groups, self.top_groups, self.slices, self.candidates = groups, top_groups, slices, candidates
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.set_bias(bias is not None, bias_rate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def late(self) -> bool:
        """Whether the weights are the softmax over the selected logits, and so sum to 1."""
        return self.score == "softmax" and self.gating == "topk_softmax"

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with without_autocast(x_TD):
            logits_TE = self.logits(x_TD, ctx)
            scores_TE = SCORES[self.score](logits_TE)
            of_TE = logits_TE if self.late else scores_TE
            if self.bias_on is None and self.groups is None:
                kept_TK, index_TK = of_TE.topk(self.k, dim=-1)
            else:
                index_TK = self._select(logits_TE, scores_TE, of_TE)
                kept_TK = of_TE.gather(1, index_TK)
            if self.late:
                weight_TK = kept_TK.softmax(dim=-1)
            else:
                weight_TK = divide_by_sum(kept_TK) if self.renormalize else kept_TK
            if self.scale != 1:
                weight_TK = weight_TK * self.scale
            probs_TE = probabilities(self.score, logits_TE, scores_TE)
        return Routing.from_topk(index_TK, weight_TK, logits_TE, probs_TE, logits_TE.shape[1])

    def logits(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """[T, E] of the candidates, float32, or float64 where ``x_TD`` is."""
        return wide_linear(x_TD, self.weight[: self.candidates] if self.candidates else self.weight)

    @torch.no_grad()
    def _select(self, logits_TE: Tensor, scores_TE: Tensor, choice_TE: Tensor) -> Tensor:
        """[T, K] the experts of each token, by ``choice_TE`` or by what the bias is added to."""
        if self.bias is not None:
            choice_TE = (logits_TE if self.bias_on == "logits" else scores_TE) + self.bias[
                : scores_TE.shape[1]
            ]
        if self.groups == "slices":
            return one_of_each_slice(choice_TE, self.slices, self.k)
        if isinstance(self.groups, int):
            choice_TE = keep_groups(choice_TE, self.groups, self.top_groups)
        return choice_TE.topk(self.k, dim=-1).indices

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, self.k, fixed=True)

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, k={self.k}, score={self.score}, gating={self.gating}, "
            f"renormalize={self.renormalize}"
        )
