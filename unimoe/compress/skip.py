"""Skipping experts of single tokens: rules that read a routing and drop some of its pairs.

Three published rules, and one threshold for all tokens, their control:

=====  ==================================================================================  ===========
rule   drops                                                                               module
=====  ==================================================================================  ===========
MoDES  pairs whose weight is below the threshold of the layer and the token's modality     here
ODP    pairs whose weight is small beside the first expert's; important tokens keep all    :mod:`.odp`
OTP    what a small trained head says of the token                                         :mod:`.otp`
=====  ==================================================================================  ===========

A dropped pair has the id ``num_experts`` and the weight 0, as :func:`unimoe.compress.route.route` wants it.

Shapes: T tokens, K slots of a token, L MoE layers, M modalities, D hidden.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.model.configuration import MODALITIES
from unimoe.moe.records import current_context
from unimoe.moe.view import MoEView

from .rows import modality_ids


def drop(index_TK: Tensor, weight_TK: Tensor, dropped_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The routing without the pairs where ``dropped_TK`` [T, K] is true; the other weights stay."""
    return index_TK.masked_fill(dropped_TK, num_experts), weight_TK.masked_fill(dropped_TK, 0)


def ranks(weight_TK: Tensor) -> Tensor:
    """[T, K] place of each pair among its token's, the largest weight first, from 0."""
    return weight_TK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def parse_thresholds(text: str) -> dict[str, float]:
    """``image=0.5,text=0.2`` as a threshold for each named modality; a number alone is that of all.

    Raises:
        UserError: a part is no threshold of a known modality.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.rpartition("="))
        names = [name] if equals else list(MODALITIES)
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"skip: found {part!r}, expected MODALITY=THRESHOLD or a threshold") from None
        found |= dict.fromkeys(names, number)
    return check_thresholds(found)


def check_thresholds(found: Mapping[str, float]) -> dict[str, float]:
    """The thresholds themselves.

    Raises:
        UserError: one is below 0, or is for no known modality.
    """
    for name, value in found.items():
        if name not in MODALITIES:
            raise UserError(f"skip: found the modality {name!r}, expected one of {', '.join(MODALITIES)}")
        if not 0 <= value < math.inf:
            raise UserError(f"skip: the threshold of {name} is {value}, expected 0 or more")
    return dict(found)


@dataclass(frozen=True)
class Thresholds:
    """Skip a pair if its weight, times the layer's factor, is below the threshold of the token's modality.

    MoDES, arXiv 2511.15690, eq. 3-5: the weight is the one the output is multiplied by, the kept weights are
    not renormalised, and a token may lose all of its routed experts. Without factors, and with the same
    threshold everywhere, it is the control: one threshold.
    """

    tau: Mapping[str, float]
    """Threshold by modality; a modality that is not there keeps all of its pairs."""
    alpha: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """[L] factor of each layer by modality, summing to 1; a modality that is not there has none.

    ``paper``: the same for all modalities; ``code``: each modality has its own."""
    power: float = 1.0
    """Exponent of the factors. As published 1; on models in which one layer's factor outweighs all others',
    less keeps the others in play."""
    keep_sum: bool = False
    """Scale the weights that are left, so that a token's sum stays as it was; off as published. Where weights
    are nearly equal, experts that agree lose nothing by it, and half of their output without it."""

    def limits(self, layers: int) -> Tensor:
        """[L, M] float32: the weight below which a pair is skipped, tau / alpha ** power. Kept, since every
        layer of every forward pass asks for it."""
        if layers in self._limits:
            return self._limits[layers]
        limit_LM = torch.zeros(layers, len(MODALITIES))
        for name, tau in self.tau.items():
            column = torch.full((layers,), float(tau))
            if tau and name in self.alpha:
                column = column / torch.tensor(list(self.alpha[name])).pow(self.power)
            limit_LM[:, MODALITIES.index(name)] = column
        self._limits[layers] = limit_LM
        return limit_LM

    @cached_property
    def _limits(self) -> dict[int, Tensor]:
        return {}

    def attach(self, layers: Sequence[MoEView]) -> None:
        """Do nothing: the rule needs a routing alone."""

    def apply(
        self, layer: MoEView, layers: int, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The routing of one of ``layers`` MoE layers without what is skipped."""
        limit_M = self.limits(layers)[layer.index].to(weight_TK.device)
        modality_T = modality_ids(current_context(), len(weight_TK), weight_TK.device)
        index_TK, kept_TK = drop(
            index_TK, weight_TK, weight_TK < limit_M[modality_T][:, None], layer.num_experts
        )
        return index_TK, keep_sum(weight_TK, kept_TK) if self.keep_sum else kept_TK

    def to_plan(self) -> dict[str, Any]:
        """Settings of the rule as a plan keeps them."""
        plan: dict[str, Any] = {"rule": "thresholds", "tau": dict(self.tau)}
        if self.alpha:
            plan |= {
                "alpha": {name: list(row) for name, row in self.alpha.items()},
                "power": self.power,
            }
        return plan | ({"keep_sum": True} if self.keep_sum else {})

    def check(self, layers: int) -> None:
        """
        Raises:
            UserError: there is not one factor for each layer, or a threshold is out of range.
        """
        check_thresholds(self.tau)
        for name, row in self.alpha.items():
            if len(row) != layers or name not in MODALITIES:
                raise UserError(
                    f"skip: found {len(row)} factors of {name}, expected one for each of {layers} MoE layers"
                )


def keep_sum(weight_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """[T, K] the weights, those of kept pairs scaled so that a token's sum stays as it was."""
    total_T1 = weight_TK.sum(dim=1, keepdim=True)
    kept_T1 = kept_TK.sum(dim=1, keepdim=True)
    return kept_TK * torch.where(kept_T1 > 0, total_T1 / kept_T1, 1)
