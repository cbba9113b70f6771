"""ODP, the online pruning of MC-MoE: the second expert goes where its weight is small beside the first's.

Shapes: B rows, S tokens of a row, T = B * S tokens, K slots of a token, L MoE layers, H attention heads,
D hidden.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.records import current_context
from unimoe.moe.view import MoEView

from .skip import drop, keep_sum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ratios:
    """Skip a pair if its weight is below ``mu`` times that of the token's first expert.

    ODP of MC-MoE (arXiv 2410.06270, section 3.3), there for top-2: the second expert goes if p2 < mu p1, and
    the first then has the weight of both. The ``protect`` most important tokens of a prompt keep all experts;
    tokens that are decoded are not protected.
    """

    mu: Sequence[float]
    """[L] of each MoE layer: the median of p2 / p1 over calibration tokens; 0 skips nothing."""
    protect: float = 0.02
    """Share of a prompt's tokens that is protected. It needs the attention weights, which models only compute
    with ``attn_implementation="eager"``."""

    def attach(self, layers: Sequence[MoEView]) -> None:
        """Follow the attention in front of each layer, if tokens are protected."""
        for layer in layers:
            attention = getattr(layer.parent, "self_attn", None)
            if self.protect and self.mu[layer.index] and attention is not None:
                attention.register_forward_hook(_Attention(layer))

    def apply(
        self, layer: MoEView, layers: int, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The routing of one of ``layers`` MoE layers without what is skipped."""
        first_T1 = weight_TK.amax(dim=1, keepdim=True)
        dropped_TK = (weight_TK < self.mu[layer.index] * first_T1) & (weight_TK < first_T1)
        attention_BHSS = layer.block.__dict__.pop(_SEEN, None)
        if attention_BHSS is not None and attention_BHSS.shape[2] > 1:
            dropped_TK &= ~important(x_TD, attention_BHSS, self.protect)[:, None]
        index_TK, kept_TK = drop(index_TK, weight_TK, dropped_TK, layer.num_experts)
        return index_TK, keep_sum(weight_TK, kept_TK)

    def to_plan(self) -> dict[str, Any]:
        """As a plan keeps it."""
        return {"rule": "ratios", "mu": list(self.mu), "protect": self.protect}

    def check(self, layers: int) -> None:
        """
        Raises:
            UserError: there is not one ratio for each layer, or a value is out of range.
        """
        if len(self.mu) != layers:
            raise UserError(
                f"skip: found {len(self.mu)} ratios, expected one for each of {layers} MoE layers"
            )
        if not 0 <= self.protect <= 1:
            raise UserError(f"skip: protect is {self.protect}, expected 0 to 1")


_SEEN = "_unimoe_attention"


class _Attention:
    """A forward hook that leaves attention weights at the MoE block behind it."""

    def __init__(self, layer: MoEView):
        self.layer, self.warned = layer, False

    def __call__(self, module: Any, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None and not self.warned:
            self.warned = True
            logger.warning(
                "%s: no token is protected from skipping, for lack of attention weights; load the model with "
                "attn_implementation='eager'",
                self.layer.name,
            )
        self.layer.block.__dict__[_SEEN] = weights


def important(x_TD: Tensor, attention_BHSS: Tensor, share: float) -> Tensor:
    """[T] bool: the most important tokens of each row: ``share`` of its real tokens, rounded up."""
    rows, length = attention_BHSS.shape[0], attention_BHSS.shape[2]
    pad_T = current_context().pad_T
    real_BS = x_TD.new_ones(rows, length, dtype=torch.bool) if pad_T is None else ~pad_T.reshape(rows, length)
    found_BS = torch.zeros_like(real_BS)
    for row, x_SD in enumerate(x_TD.reshape(rows, length, -1)):
        real_S = real_BS[row].nonzero()[:, 0]
        attention_HRR = attention_BHSS[row][:, real_S][:, :, real_S]
        best_R = importance(x_SD[real_S], attention_HRR).topk(math.ceil(share * len(real_S))).indices
        found_BS[row, real_S[best_R]] = True
    return found_BS.flatten()


def importance(x_SD: Tensor, attention_HSS: Tensor, compat: bool = False) -> Tensor:
    """[S] importance of a prompt's tokens (MC-MoE, eq. 6): ||x_j||_1 times the mean attention that token j
    gets from the S - j tokens from itself on.

    Args:
        x_SD: inputs of the MoE layer.
        attention_HSS: attention weights, rows attend to columns.
        compat: as the released code, which sums over keys instead of queries; that sum is always 1.
    """
    later_S = torch.arange(len(x_SD), 0, -1, device=x_SD.device)
    received_S = attention_HSS.mean(dim=0).sum(dim=1 if compat else 0)
    return x_SD.abs().sum(dim=1) * received_S / later_S
