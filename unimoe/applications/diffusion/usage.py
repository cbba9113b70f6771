"""How the experts that images visit depend on their times.

Shapes: L MoE layers, E experts, N images of a split.
"""

from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

PAIRED = 2_000
"""Samples of which all pairs are compared: a matrix of them has 32 MB."""


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
    found: Any = spearmanr(distance.numpy(), share.numpy())
    return float(found.statistic)
