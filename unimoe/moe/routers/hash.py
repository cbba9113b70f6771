"""Experts chosen by a token's id.

Shapes: T tokens, D hidden, E experts, K experts of a token, V vocabulary.
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
from .select import SCORES, check_score, divide_by_sum, probabilities


@ROUTERS.register(
    "hash",
    source="Hash Layers, arXiv 2106.04426; weights: DeepseekV4HashRouter of transformers",
    axis="sparse, non-trainable token choice",
    exact="whole copies, renormalized",
)
class HashRouter(Router):
    """A fixed random table sends each id of the vocabulary to K experts; only their weights are learned.

    Needs ``Context.token_T``. All tokens of an image share the id of its placeholder, so they share experts.

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        vocab_size: V.
        k: experts that each token visits. With sliced FFNs, those of k / slices whole copies.
        score: weight of an expert before ``renormalize``: ``softmax``, ``sigmoid`` or ``sqrt_softplus``
            (DeepSeek-V4) of the logits x W^T.
        renormalize: divide the scores of a token's experts by their sum.
        scale: factor of all weights.
        seed: seed of the table; each layer has a table of its own.
        init_std: standard deviation of the initial weights.
        slices: experts that each FFN was cut into.
        position: of this layer among the MoE layers.

    Raises:
        UserError: ``k`` is out of range, or the model reads no token ids.
    """

    table: Tensor
    """[V, K] int64 experts of each id; saved with the model."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        vocab_size: int,
        k: int = 1,
        score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "sqrt_softplus",
        renormalize: bool = True,
        scale: float = 1.0,
        seed: int = 0,
        init_std: float = 0.02,
        slices: int = 1,
        position: int = 0,
    ):
        super().__init__()
        if not vocab_size:
            raise UserError("moe.router: hash chooses experts by token id, expected a model that reads them")
        if not 1 <= k <= num_experts or k % slices:
            raise UserError(f"moe.router.k is {k}, expected a multiple of {slices} in 1..{num_experts}")
        check_score(score, renormalize)
        self.num_experts, self.k, self.score, self.renormalize = num_experts, k, score, renormalize
        self.scale, self.seed, self.init_std = scale, seed + position, init_std
        self.slices = slices
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("table", torch.empty(vocab_size, k, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        if not self.table.is_meta:
            generator = torch.Generator().manual_seed(self.seed)
            copies, whole = self.num_experts // self.slices, self.k // self.slices
            noise_VC = torch.rand(len(self.table), copies, generator=generator, device="cpu")
            first_VX1 = noise_VC.topk(whole, dim=1).indices[:, :, None] * self.slices
            self.table.copy_((first_VX1 + torch.arange(self.slices, device="cpu")).flatten(1))

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        if ctx.token_T is None:
            raise UserError("moe.router: hash chooses experts by token id; the model got no input_ids")
        with without_autocast(x_TD):
            logits_TE = wide_linear(x_TD, self.weight)
            scores_TE = SCORES[self.score](logits_TE)
            index_TK = self.table[ctx.token_T]
            weight_TK = scores_TE.gather(1, index_TK)
            weight_TK = self.scale * (divide_by_sum(weight_TK) if self.renormalize else weight_TK)
            probs_TE = probabilities(self.score, logits_TE, scores_TE)
        return Routing.from_topk(index_TK, weight_TK, logits_TE, probs_TE, self.num_experts)

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, self.k, fixed=True)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}, vocabulary={len(self.table)}, score={self.score}"
