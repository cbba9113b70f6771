"""Which experts the samples of a run visit, and what their labels say about it.

Shapes: B samples, T tokens, L MoE layers, E experts, N samples of a split, K labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe.moe import LayerRecord


def visits(records: Sequence[LayerRecord], samples: int) -> Tensor:
    """[B, L, E] how many tokens of each sample visit each expert; [B, 0, 0] without MoE layers."""
    if not records:
        return torch.zeros(samples, 0, 0)
    rows = []
    for one in records:
        assert one.ctx.sample_T is not None
        chosen_TE = one.routing.chosen().float()
        rows.append(
            chosen_TE.new_zeros(samples, chosen_TE.shape[1]).index_add(0, one.ctx.sample_T, chosen_TE)
        )
    return torch.stack(rows, dim=1)


def label_expert_information(visits_NLE: Tensor, label_N: Tensor) -> list[float]:
    """Mutual information in nats of label and expert of a random token, by layer."""
    labels = int(label_N.max()) + 1
    found = []
    for visits_NE in visits_NLE.double().unbind(1):
        joint_KE = torch.zeros(labels, visits_NE.shape[1], dtype=torch.float64).index_add(
            0, label_N, visits_NE
        )
        joint_KE = joint_KE / joint_KE.sum()
        apart_KE = joint_KE.sum(dim=1, keepdim=True) * joint_KE.sum(dim=0)
        some = joint_KE > 0
        found.append(float((joint_KE[some] * (joint_KE[some] / apart_KE[some]).log()).sum()))
    return found


def live_experts(visits_NLE: Tensor) -> list[int]:
    """Experts of each layer that any token visits."""
    return (visits_NLE.sum(dim=0) > 0).sum(dim=1).tolist()
