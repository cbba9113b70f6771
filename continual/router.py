"""The cosine router of a growing mixture of low-rank experts.

Shapes: T tokens, D inputs of the projection, E experts of all banks so far, E_b experts of bank b, K kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe import Context, Router, Routing

from .guidance import Guide, top_gates


class CosineTopK(Router):
    """One row per expert; rows arrive bank by bank (LLaVA-DyMoE, arXiv 2603.27481).

    1. s = gamma * cos(x, row), in float32 whatever dtype the model has: at a temperature of 0.01 the cosines
       of half precision are too coarse to tell experts apart
    2. while a task after the first is learned, the guide masks the groups that a token may not use
    3. the K largest of all rows are kept, weighted by softmax(s / temperature) over them
    """

    def __init__(
        self,
        in_features: int,
        k: int = 16,
        scale: float = 1.0,
        temperature: float = 0.01,
        guide: Guide | None = None,
        name: str = "",
    ):
        """``guide`` is shared by all routers of a model, to which this one is known as ``name``."""
        super().__init__()
        if k < 1 or temperature <= 0:
            raise UserError(f"cosine router got k = {k} and temperature {temperature}, expected both above 0")
        self.in_features, self.k, self.scale, self.temperature = in_features, k, scale, temperature
        self.guide, self.name = guide, name
        self.rows = nn.ParameterList()

    @property
    def num_experts(self) -> int:  # type: ignore[override]  # grows
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Experts of each bank."""
        return [len(row) for row in self.rows]

    def grow(self, experts: int) -> nn.Parameter:
        """Add the rows of a new bank, Kaiming uniform."""
        row_ED = torch.empty(experts, self.in_features)
        nn.init.kaiming_uniform_(row_ED, a=5**0.5)
        like = self.rows[0].device if self.rows else row_ED.device
        self.rows.append(nn.Parameter(row_ED.to(like)))
        return self.rows[-1]

    def scores(self, x_TD: Tensor) -> Tensor:
        """[T, E] float32 scaled cosines; a token of zeros has cosine 0 with everything."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            # the small product is divided by the length, not the wide token: one pass less over [T, D]
            length_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).clamp_min(1e-12)
            row_ED = F.normalize(torch.cat([*self.rows]).float(), dim=-1)
            # bank by bank: a wider product would round the old experts' scores otherwise than before
            products = [F.linear(x_TD, part) for part in row_ED.split(self.sizes)]
            return torch.cat(products, dim=-1) * (self.scale / length_T1)

    def gate(self, x_TD: Tensor) -> list[Tensor]:
        """Weights [T, E_b] of each bank's experts, zero where an expert is not among the token's K."""
        scores_TE = self.scores(x_TD)
        sizes = self.sizes
        mask_TE = None if self.guide is None else self.guide.mask(scores_TE, sum(sizes[:-1]))
        gate_TE = top_gates(scores_TE, self.k, self.temperature, mask_TE)
        if self.guide is not None:
            self.guide.observe(self.name, scores_TE, gate_TE, sizes, self.k, self.temperature)
        return list(gate_TE.split(sizes, dim=-1))

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        """As a router of an MoE layer, without a guide."""
        scores_TE = self.scores(x_TD)
        kept_TK, index_TK = scores_TE.topk(min(self.k, self.num_experts), dim=-1)
        weight_TK = (kept_TK / self.temperature).softmax(dim=-1)
        probs_TE = (scores_TE / self.temperature).softmax(dim=-1)
        return Routing.from_topk(index_TK, weight_TK, scores_TE, probs_TE, self.num_experts)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, k={self.k}, temperature={self.temperature}"


class SoftmaxGate(nn.Module):
    """A dense softmax over the experts of one bank (MoELoRA, CoIN, arXiv 2403.08350)."""

    def __init__(self, in_features: int, experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def gate(self, x_TD: Tensor) -> list[Tensor]:
        """[T, E] in a list of one."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return [F.linear(x_TD.float(), self.weight.float()).softmax(dim=-1)]
