"""A router with weights of its own for each modality.

Shapes: T tokens, D hidden, E experts, M modalities.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context

from .base import Router, wide_linear
from .top_k import TopK

MODALITIES = 5
"""text, image, video, speech, audio: see :class:`~unimoe.moe.records.Context`."""


@ROUTERS.register(
    "modality",
    source="SparseUnifiedModel, arXiv 2512.02351: separate gates for text and image tokens",
    axis="sparse, token choice, fixed number",
    exact="whole copies, weights sum to 1; or all slices, combine: one_plus, score: logits, init_std: 0",
)
class ModalityRouter(TopK):
    """``top_k`` with a linear map for each modality; tokens of an unknown one count as text.

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        k: experts that each token visits, 1..E.
        gating: ``gating`` of ``top_k``.
        renormalize: divide the selected scores by their sum.
        init_std: standard deviation of the initial weights.
        score: ``score`` of ``top_k``; ``logits`` takes them as they are.
        slices: experts that each FFN was cut into.

    Raises:
        UserError: a setting is out of range or not known.
    """

    knobs = (*Router.knobs, "k")
    expert_rows = ()

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int = 2,
        gating: Literal["topk_softmax", "softmax_topk"] = "topk_softmax",
        renormalize: bool = True,
        init_std: float = 0.02,
        score: Literal["softmax", "sigmoid", "sqrt_softplus", "logits"] = "softmax",
        slices: int = 1,
    ):
        super().__init__(
            hidden_size, num_experts, k, gating, renormalize, init_std, score=score, slices=slices
        )
        self.weight = nn.Parameter(torch.empty(MODALITIES * num_experts, hidden_size))
        self.reset_parameters()

    def logits(self, x_TD: Tensor, ctx: Context) -> Tensor:
        logits_TME = wide_linear(x_TD, self.weight).unflatten(1, (MODALITIES, -1))
        if ctx.modality_T is None:
            return logits_TME[:, 0]
        return logits_TME[torch.arange(len(x_TD), device=x_TD.device), ctx.modality_T.reshape(-1)]
