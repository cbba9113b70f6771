"""The routers of banks of low-rank experts: cosine top-k for growing banks, softmax for a fixed one.

Shapes: T tokens, D inputs of the projection, E experts of all banks so far, K experts kept per token.
"""

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unimoe.errors import UserError
from unimoe.moe import Context, Router, Routing
from unimoe.moe.routers.base import RouterDescription

from .guidance import Guide, top_weights


class CosineTopK(Router):
    """One row per expert; rows are added bank by bank (LLaVA-DyMoE, arXiv 2603.27481).

    1. s = gamma * cos(x, row), in float32 regardless of the model's dtype: at a temperature of 0.01,
       half-precision cosines are too coarse to separate the experts
    2. during training of a later task, the guide masks the experts that a token may not use
    3. the K largest scores are kept, weighted by softmax(s / temperature) over them
    """

    def __init__(
        self,
        in_features: int,
        k: int = 16,
        scale: float = 1.0,
        temperature: float = 0.01,
        guide: Guide | None = None,
    ):
        """``guide`` is shared by all routers of a model.

        Raises:
            UserError: unless ``k`` and ``temperature`` are above 0.
        """
        super().__init__()
        if k < 1 or temperature <= 0:
            raise UserError(f"cosine router got k = {k} and temperature {temperature}, expected both above 0")
        self.in_features, self.k, self.scale, self.temperature = in_features, k, scale, temperature
        self.guide = guide
        self.rows = nn.ParameterList()

    @property
    def num_experts(self) -> int:  # type: ignore[override]  # grows
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Number of experts of each bank."""
        return [len(row) for row in self.rows]

    def add_rows(self, experts: int) -> nn.Parameter:
        """Add the rows of a new bank, initialised Kaiming uniform."""
        row_ED = torch.empty(experts, self.in_features)
        nn.init.kaiming_uniform_(row_ED, a=5**0.5)
        device = self.rows[0].device if self.rows else row_ED.device
        self.rows.append(nn.Parameter(row_ED.to(device)))
        return self.rows[-1]

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        scores_TE = self.scores(x_TD)
        mask_TE = None if self.guide is None else self.guide.mask(scores_TE, sum(self.sizes[:-1]))
        index_TK, weight_TK = top_weights(scores_TE, self.k, self.temperature, mask_TE)

        def probs() -> Tensor:
            return (scores_TE / self.temperature).softmax(dim=-1)

        return Routing.from_topk(index_TK, weight_TK, scores_TE, probs, scores_TE.shape[1])

    def scores(self, x_TD: Tensor) -> Tensor:
        """[T, E] float32 scaled cosines; a token of zeros has cosine 0 with every row."""
        with torch.autocast(x_TD.device.type, enabled=False):
            units: list[Tensor] = []
            # frozen rows at once, and apart from those that train, so that no gradient is computed for them
            for _, group in groupby(self.rows, lambda row_ED: row_ED.requires_grad):
                rows = list(group)
                unit_ED = F.normalize(torch.cat(rows).float(), dim=-1)
                units += unit_ED.split([len(row_ED) for row_ED in rows])
            return _Cosines.apply(x_TD.float(), self.scale, *units)

    def describe(self) -> RouterDescription:
        """Describe the router without the guide, which masks experts during training only."""
        return RouterDescription(self.num_experts, min(self.k, self.num_experts), fixed=True)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}, temperature={self.temperature}"


class _Cosines(torch.autograd.Function):
    """``scale`` times the cosines of tokens with the unit rows of several banks, side by side.

    The forward pass takes one product for each bank: a wider one would round the old experts' scores
    differently. The backward pass takes one for the tokens, dx = p U - x sum(dy * s) / |x|^2 with
    p = dy * scale / |x|, and one for each bank that trains.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, scale: float, *units: Tensor) -> Tensor:
        length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).clamp_min(1e-12)
        # the small product is divided by the length, not the wide token: one pass less over [T, D]
        factor_T1 = scale / length_T1
        score_TE = torch.cat([F.linear(x_TD, unit_ED) for unit_ED in units], dim=-1) * factor_T1
        ctx.save_for_backward(x_TD, length_T1, factor_T1, score_TE, *units)
        return score_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TE: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TD, length_T1, factor_T1, score_TE, *units = ctx.saved_tensors
        p_TE = dy_TE * factor_T1
        dx_TD = None
        if ctx.needs_input_grad[0]:
            along_T1 = (dy_TE * score_TE).sum(-1, keepdim=True) / length_T1.square()
            dx_TD = (p_TE @ torch.cat(units)).addcmul_(x_TD, along_T1, value=-1)
        parts_TE, needs = p_TE.split([len(unit_ED) for unit_ED in units], dim=-1), ctx.needs_input_grad[2:]
        drows = (part_TE.T @ x_TD if need else None for part_TE, need in zip(parts_TE, needs, strict=True))
        return dx_TD, None, *drows


class SoftmaxRouter(Router):
    """A dense softmax over the experts of one bank (MoELoRA, CoIN, arXiv 2403.08350)."""

    def __init__(self, in_features: int, experts: int):
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.empty(experts, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            probs_TE = logits_TE.softmax(dim=-1)
        return Routing.from_mask(torch.ones_like(probs_TE, dtype=torch.bool), probs_TE, logits_TE, probs_TE)

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, self.num_experts, fixed=True)
