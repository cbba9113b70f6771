"""Routing of a trained model on held-out data, in a few numbers.

Shapes: T tokens, E experts, L MoE layers, M kinds of token.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from unimoe.analysis.routing_stats import RoutingStats
from unimoe.moe import ExpertLoad, LayerRecord, MoELayer
from unimoe.moe.join import join


class RoutingMeasures:
    """Accumulates over forward passes."""

    def __init__(self) -> None:
        self.stats = RoutingStats()
        self._entropy = self._tokens = 0.0

    def add(self, records: Sequence[LayerRecord], kind: str | None) -> None:
        """Count the records of complete forward passes; ``kind`` as of :class:`RoutingStats`."""
        self.stats.add(records, kind)
        for one in join(list(records)):
            probs_TE = one.routing.probs_TE.detach().clamp(min=1e-9)
            own_T1 = -(probs_TE * probs_TE.log()).sum(1, keepdim=True) / math.log(max(2, probs_TE.shape[1]))
            self._entropy += float(one.total(own_T1))
            self._tokens += float(one.tokens)

    def summary(self, layers: dict[int, MoELayer]) -> dict[str, Any]:
        """``load`` and ``kinds`` (tables of shares), and, as means over the MoE layers:

        ``max_over_mean``   load of the fullest expert over the mean, of experts with weights
        ``dead``            share of these experts that no token visited
        ``entropy``         of the router's probabilities: 0 one expert, 1 all alike
        ``information``     mutual information of the kind of a token and its experts, in nats
        """
        pairs = {
            layer: torch.stack([own[layer] for own in self.stats.pairs.values() if layer in own])
            for layer in self.stats.layers
        }
        real = {layer: count_ME[:, : layers[layer].num_experts] for layer, count_ME in pairs.items()}
        return {
            "load": self.stats.expert_load(),
            "max_over_mean": fmean(float(ExpertLoad(one.sum(0)).max_over_mean) for one in real.values()),
            "dead": fmean(float((one.sum(0) == 0).float().mean()) for one in real.values()),
            "entropy": self._entropy / max(self._tokens, 1),
            "information": fmean(map(mutual_information, pairs.values())),
        }


def mutual_information(count_ME: Tensor) -> float:
    """Mutual information of the row and the column of a table of counts, in nats."""
    joint_ME = count_ME.double() / count_ME.sum().clamp(min=1)
    apart_ME = joint_ME.sum(1, keepdim=True) * joint_ME.sum(0, keepdim=True)
    present = joint_ME > 0
    return float((joint_ME[present] * (joint_ME[present] / apart_ME[present]).log()).sum())
