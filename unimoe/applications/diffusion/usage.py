"""Which experts the samples of a class visit.

Shapes: B samples, T tokens, L MoE layers, E experts, N samples of a split, K classes.
"""

from collections.abc import Sequence

import torch
from scipy.stats import spearmanr
from torch import Tensor

from unimoe.moe import LayerRecord

PAIRED = 2_000
"""Samples of which all pairs are compared: a matrix of them has 32 MB."""


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


def class_expert_information(visits_NLE: Tensor, label_N: Tensor) -> list[float]:
    """Mutual information in nats of class and expert of a random token, by layer."""
    classes = int(label_N.max()) + 1
    found = []
    for visits_NE in visits_NLE.double().unbind(1):
        joint_KE = torch.zeros(classes, visits_NE.shape[1], dtype=torch.float64).index_add(
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


def overlap_by_distance(visits_NLE: Tensor, time_N: Tensor) -> float:
    """Spearman's correlation of the distance between two samples' times and the share of experts that both
    visit, over all pairs of at most ``PAIRED`` samples in equal steps; 0 where it does not vary."""
    stride = -(-len(time_N) // PAIRED)
    visits_NLE, time_N = visits_NLE[::stride], time_N[::stride]
    sets_NF = (visits_NLE > 0).flatten(1).double()
    both_NN = sets_NF @ sets_NF.T
    either_NN = sets_NF.sum(dim=1)[:, None] + sets_NF.sum(dim=1) - both_NN
    first, second = torch.triu_indices(len(time_N), len(time_N), offset=1)
    share, distance = (both_NN / either_NN)[first, second], (time_N[first] - time_N[second]).abs()
    if float(share.std()) == 0:
        return 0.0
    return float(spearmanr(distance.numpy(), share.numpy()).statistic)
