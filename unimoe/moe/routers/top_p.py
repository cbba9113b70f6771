"""A variable number of experts per token, chosen by cumulative probability.

Shapes: T tokens, D hidden, E experts to choose from (null ones included, last), S shared experts.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.arguments import without_autocast
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import Router, RouterDescription, wide_linear
from .sparse_mixer import GRADIENT_ESTIMATORS, sparse_mixer


@ROUTERS.register(
    "top_p",
    source="Huang et al., arXiv 2403.07652; UniMoE-Audio, arXiv 2510.13344",
    axis="sparse, token choice, number by token",
    exact="whole copies, renormalized",
)
class TopP(Router):
    """Selects the smallest set of experts whose probabilities sum to at least ``p``.

    1. logits, in float32 or finer, of the E experts to choose from, of which the last ``null_experts`` return
       zero (a token that selects one skips computation), and of the S shared experts, visited by every token
    2. the fewest experts, in order of probability, whose sum reaches ``p``; at least one
    3. weights: softmax over the selected and the shared experts, so that they sum to 1; without
       ``renormalize`` the probabilities over all experts
    4. with a ``gradient_estimator``, in training, the experts are sampled instead, see :func:`sparse_mixer`;
       their weights are normalised to the sum that step 3 gives the selected experts

    The shared experts' weights are ``Routing.extra["shared_TS"]``. Sources: DCMoE and UniMoE-Audio
    (2510.13344); without null and shared experts and ``renormalize``: Huang et al., 2403.07652.

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        p: cumulative probability of the experts of a token, above 0 and at most 1.
        null_experts: experts without weights behind the others; visiting one skips computation.
        shared_experts: experts that every token visits.
        renormalize: divide the weights by their sum.
        gradient_estimator: Uni-MoE-2.0-Omni's, with the constants of its ``paper`` or of UniMoE-Audio's
            ``code``; None uses the gradient of the softmax weights.
        jitter: for the estimator, see :func:`sparse_mixer`.
        init_std: standard deviation of the initial weights.

    Raises:
        UserError: ``p`` is out of range, or the estimator is not known.
    """

    knobs = (*Router.knobs, "p")
    expert_rows = ("weight",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        p: float = 0.7,
        null_experts: int = 0,
        shared_experts: int = 0,
        renormalize: bool = True,
        gradient_estimator: Literal["paper", "code"] | None = None,
        jitter: float = 0.01,
        init_std: float = 0.02,
    ):
        super().__init__()
        if null_experts < 0:
            raise UserError(f"moe.router.null_experts is {null_experts}, expected at least 0")
        if not 0 < p <= 1:
            raise UserError(f"moe.router.p is {p}, expected above 0 and at most 1")
        if gradient_estimator is not None and gradient_estimator not in GRADIENT_ESTIMATORS:
            known = ", ".join(GRADIENT_ESTIMATORS)
            raise UserError(
                f"moe.router.gradient_estimator is {gradient_estimator!r}, expected one of {known}"
            )
        self.num_experts, self.shared_experts = num_experts + null_experts, shared_experts
        self.p, self.renormalize, self.jitter = p, renormalize, jitter
        self.gradient_estimator = gradient_estimator
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(self.num_experts + shared_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with without_autocast(x_TD):
            all_TX = wide_linear(x_TD, self.weight)
            logits_TE = all_TX[:, : self.num_experts]
            probs_TE = logits_TE.softmax(dim=-1)
            k_T = self.counts(probs_TE)
            order_TE = logits_TE.argsort(dim=-1, descending=True)
            rank_TE = torch.arange(self.num_experts, device=x_TD.device).expand_as(order_TE)
            chosen_TE = torch.zeros_like(order_TE).scatter(1, order_TE, rank_TE) < k_T[:, None]
            mixed_TE = None
            if self.gradient_estimator is not None and self.training:
                mixed_TE = sparse_mixer(
                    logits_TE, k_T, self.jitter, *GRADIENT_ESTIMATORS[self.gradient_estimator]
                )
                chosen_TE = mixed_TE.detach() > 0
            shared_TS = chosen_TE.new_ones(len(x_TD), self.shared_experts)
            kept_TX = torch.cat([chosen_TE, shared_TS], dim=1)
            if self.renormalize:
                weight_TX = all_TX.masked_fill(~kept_TX, -torch.inf).softmax(dim=-1)
            else:
                weight_TX = all_TX.softmax(dim=-1) * kept_TX
            weight_TE, shared_TS = weight_TX.split([self.num_experts, self.shared_experts], dim=1)
            if mixed_TE is not None:
                weight_TE = mixed_TE / mixed_TE.sum(1, keepdim=True) * weight_TE.sum(1, keepdim=True)
        routing = Routing.from_mask(chosen_TE, weight_TE, logits_TE, probs_TE)
        if self.shared_experts:
            routing.extra["shared_TS"] = shared_TS
        return routing

    def counts(self, probs_TE: Tensor) -> Tensor:
        """[T] number of experts that each token selects."""
        below_TE = probs_TE.sort(dim=-1, descending=True).values.cumsum(dim=-1) < self.p
        return (below_TE.sum(dim=-1) + 1).clamp(
            max=self.num_experts
        )  # rounding may leave the whole sum below 1

    def describe(self) -> RouterDescription:
        uniform_1E = torch.full((1, self.num_experts), 1 / self.num_experts, device="cpu")  # never meta
        return RouterDescription(self.num_experts, int(self.counts(uniform_1E)), fixed=False)

    def extra_repr(self) -> str:
        shared = f", shared={self.shared_experts}" if self.shared_experts else ""
        return f"experts={self.num_experts}, p={self.p}, gradient_estimator={self.gradient_estimator}{shared}"
