"""ODP, the online pruning of MC-MoE: the second expert goes where its weight is small beside the first's.

Shapes: T tokens, K slots of a token, L MoE layers, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.view import MoEView

from .skip import drop, keep_sum


@dataclass(frozen=True)
class Ratios:
    """Skip a pair if its weight is below ``mu`` times that of the token's first expert.

    ODP of MC-MoE (arXiv 2410.06270, section 3.3), there for top-2: the second expert goes if p2 < mu p1, and
    the first then has the weight of both. The paper also protects a prompt's most important tokens, by their
    attention weights; here none is protected, since fast attention computes no such weights.
    """

    mu: Sequence[float]
    """[L] of each MoE layer: the median of p2 / p1 over calibration tokens; 0 skips nothing."""

    def attach(self, layers: Sequence[MoEView]) -> None:
        """Do nothing: the rule needs a routing alone."""

    def apply(
        self, layer: MoEView, layers: int, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The routing of one of ``layers`` MoE layers without what is skipped."""
        first_T1 = weight_TK.amax(dim=1, keepdim=True)
        dropped_TK = (weight_TK < self.mu[layer.index] * first_T1) & (weight_TK < first_T1)
        index_TK, kept_TK = drop(index_TK, weight_TK, dropped_TK, layer.num_experts)
        return index_TK, keep_sum(weight_TK, kept_TK)

    def to_plan(self) -> dict[str, Any]:
        """Settings of the rule as a plan keeps them."""
        return {"rule": "ratios", "mu": list(self.mu)}

    def check(self, layers: int) -> None:
        """
        Raises:
            UserError: there is not one ratio for each layer.
        """
        if len(self.mu) != layers:
            raise UserError(
                f"skip: found {len(self.mu)} ratios, expected one for each of {layers} MoE layers"
            )
