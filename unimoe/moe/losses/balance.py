"""The load-balance loss.

With uniform probabilities it is 1 whatever the load is, so the loss says nothing about the load: measure
that with ``expert_load``.

Shapes: E experts, L layers. Padding tokens count nowhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe.moe.load_counts import ExpertLoad, expert_load
from unimoe.moe.records import LayerRecord


def load_balance(records: LayerRecord | Sequence[LayerRecord], load: ExpertLoad | None = None) -> Tensor:
    """Load-balance loss E * sum_i f_i P_i (Fedus et al., arXiv 2101.03961, eq. 4); 1 at uniform routing,
    differentiable in P.

    Args:
        records: one record, or one per layer.
        load: f in place of this batch's, and the number of tokens that P is divided by. With the load of all
            ranks and their mean number of tokens, the mean over the ranks is the loss of the global batch.

    Returns:
        [L], or a scalar for a single record. Zero where every token is padding.
    """
    if isinstance(records, LayerRecord):
        share_E = (expert_load(records) if load is None else load).share
        mean_E = records.mean(records.routing.probs_TE, None if load is None else load.tokens)
        return records.routing.num_experts * (share_E * mean_E).sum()
    if not records:
        return torch.zeros(0)
    loads = [None if load is None else load.layer(index) for index in range(len(records))]
    return torch.stack([load_balance(one, own) for one, own in zip(records, loads, strict=True)])
