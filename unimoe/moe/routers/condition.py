"""A router that reads the condition of a sample, not its tokens.

Shapes: T tokens, B samples, C size of a condition, E experts, K per sample.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.arguments import without_autocast
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import Router, RouterDescription, wide_linear


@ROUTERS.register(
    "condition",
    source="Switch-DiT, arXiv 2403.09176; weights: the authors' code",
    axis="sparse, sample choice, fixed number",
    healing="router and experts: weights do not sum to 1; exact with experts that start at zero",
)
class ConditionRouter(Router):
    """All tokens of a sample visit the k experts of the largest probability softmax(W SiLU(c) + b), where c
    is the sample's condition (``Context.cond_BC``), such as the embedding of its timestep; the weights are
    these probabilities, not renormalised.

    Args:
        hidden_size: D, which is also C unless ``size`` says otherwise.
        num_experts: experts with weights.
        k: experts of each sample, 1..E.
        size: C; None for D.
        init_std: standard deviation of the initial weights.

    Raises:
        UserError: ``k`` is not in 1..E; or, in use, the model gives no condition.
    """

    knobs = (*Router.knobs, "k")
    expert_rows = ("weight", "bias")

    def __init__(
        self, hidden_size: int, num_experts: int, k: int = 2, size: int | None = None, init_std: float = 0.02
    ):
        super().__init__()
        if not 1 <= k <= num_experts:
            raise UserError(f"moe.router.k is {k}, expected 1..{num_experts} (the number of experts)")
        self.num_experts, self.k, self.init_std = num_experts, k, init_std
        self.weight = nn.Parameter(torch.empty(num_experts, size or hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        nn.init.zeros_(self.bias)

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        if ctx.cond_BC is None or ctx.sample_T is None:
            raise UserError("moe.router: condition needs a model that gives each sample a condition")
        with without_autocast(x_TD):
            logits_BE = wide_linear(F.silu(ctx.cond_BC), self.weight, self.bias)
            probs_BE = logits_BE.softmax(dim=-1)
        weight_BK, index_BK = probs_BE.topk(self.k, dim=-1)
        of = ctx.sample_T
        return Routing.from_topk(index_BK[of], weight_BK[of], logits_BE[of], probs_BE[of], self.num_experts)

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, self.k, fixed=True)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}"
