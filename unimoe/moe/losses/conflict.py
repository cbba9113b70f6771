"""Separation of experts whose gradients were opposed in the step before.

Shapes: E experts, L layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.experts.subspace import SubspaceExperts
from unimoe.moe.load_counts import expert_load
from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, alone


@LOSSES.register(
    "conflict", source="CDSP-MoE, arXiv 2512.20291; weights: the authors' code", axis="specialisation"
)
def conflict(
    records: Sequence[LayerRecord],
    layers: Mapping[int, Any],
    across: Across = alone,
    sparsity: float = 1e-4,
    decision: float = 1e-3,
) -> Tensor:
    """Experts that pulled shared units in opposite directions come to share less: [L].

    The sum over active experts i and j with A_ij > 0.001 of A_ij relu(-cos_ij), cos_ij as of the step before,
    plus ``sparsity`` times the mean of |A| and ``decision`` times that of s(A) (1 - s(A)), s the sigmoid.

    Args:
        records: of the layers.
        layers: the layers by the index of their records.
        across: mean over processes.
        sparsity: weight of the mean absolute topology.
        decision: weight of its indecision.

    Raises:
        UserError: experts of another kind than ``subspace``.
    """
    return torch.stack([_conflict(one, layers[one.layer], across, sparsity, decision) for one in records])


def _conflict(record: LayerRecord, layer: Any, across: Across, sparsity: float, decision: float) -> Tensor:
    experts = layer.experts
    if not isinstance(experts, SubspaceExperts):
        raise UserError(
            f"moe.losses.conflict: found {type(experts).__name__}, expected experts of kind subspace"
        )
    A_EE, influence_EE = experts.topology, experts.topology.sigmoid()
    active_E = across(expert_load(record).tokens_per_expert[: len(A_EE)]) > 0
    pair_EE = active_E[:, None] & active_E & (A_EE > 1e-3)
    pair_EE = pair_EE & ~torch.eye(len(A_EE), dtype=torch.bool, device=A_EE.device)
    opposed_EE = torch.relu(-experts.conflict_EE.to(A_EE)) * pair_EE
    undecided = (influence_EE * (1 - influence_EE)).mean()
    return (A_EE * opposed_EE).sum() + sparsity * A_EE.abs().mean() + decision * undecided
