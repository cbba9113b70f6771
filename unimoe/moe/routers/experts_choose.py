"""Experts that choose their tokens.

Shapes: T tokens, D hidden, E experts, S samples.
"""

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.arguments import without_autocast
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import Router, RouterDescription, wide_linear


@ROUTERS.register(
    "experts_choose",
    source="Expert Choice, arXiv 2202.09368, eq. 1-2; by sample: UoE, ProMoE",
    axis="sparse, expert choice",
    healing="router and FFNs: the sum of a token's weights is not 1",
)
class ExpertsChoose(Router):
    """Every expert takes the tokens of each sample that score highest for it, so that the load is even; a
    token is visited by any number of experts, also by none.

    An expert takes floor(k * n / E), at least one, of the n tokens of a sample. The weight is the softmax
    over experts. Padding is not taken. Without ``Context.sample_T`` all tokens are one sample.

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        k: experts per token on average, 1..E.
        init_std: standard deviation of the initial weights.

    Raises:
        UserError: ``k`` is not in 1..E.
    """

    knobs = (*Router.knobs, "k")
    expert_rows = ("weight",)
    looks_ahead = "lets later tokens decide on the experts of earlier ones"

    def __init__(self, hidden_size: int, num_experts: int, k: int = 2, init_std: float = 0.02):
        super().__init__()
        if not 1 <= k <= num_experts:
            raise UserError(f"moe.router.k is {k}, expected 1..{num_experts} (the number of experts)")
        self.num_experts, self.k, self.init_std = num_experts, k, init_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with without_autocast(x_TD):
            logits_TE = wide_linear(x_TD, self.weight)
            probs_TE = logits_TE.softmax(dim=-1)
        sample_T = (
            torch.zeros_like(probs_TE[:, 0], dtype=torch.int64) if ctx.sample_T is None else ctx.sample_T
        )
        wanted_TE, real_T = probs_TE.detach(), torch.ones_like(sample_T)
        if ctx.pad_T is not None:
            wanted_TE, real_T = wanted_TE.masked_fill(ctx.pad_T[:, None], -1), (~ctx.pad_T).long()
        chosen_TE = _rank(wanted_TE, sample_T) < self._takes(sample_T, real_T)[:, None]
        return Routing.from_mask(chosen_TE & real_T[:, None].bool(), probs_TE, logits_TE, probs_TE)

    def _takes(self, sample_T: Tensor, real_T: Tensor) -> Tensor:
        """[T] tokens that each expert takes of the token's sample."""
        _, row_T = sample_T.unique(return_inverse=True)
        tokens_S = torch.zeros_like(row_T).index_add(0, row_T, real_T)
        return (tokens_S * self.k // self.num_experts).clamp(min=1)[row_T]

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, self.k, fixed=False)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}"


def _rank(score_TE: Tensor, sample_T: Tensor) -> Tensor:
    """[T, E] place of each token among those of its sample, from the highest score, for each expert."""
    order_TE = score_TE.argsort(dim=0, descending=True, stable=True)
    order_TE = order_TE.gather(0, sample_T[order_TE].argsort(dim=0, stable=True))
    sorted_T = sample_T.sort().values
    place_T = torch.arange(len(sample_T), device=sample_T.device) - torch.searchsorted(sorted_T, sorted_T)
    return torch.empty_like(order_TE).scatter(0, order_TE, place_T[:, None].expand_as(order_TE))
