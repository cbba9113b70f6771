"""The load-balance loss.

With uniform probabilities it is 1 whatever the load is, so the loss says nothing about the load: measure
that with ``load``.

Shapes: T tokens, E experts, N (token, expert) pairs, L layers. Padding tokens count nowhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe.moe.expert_load import load
from unimoe.moe.records import LayerRecord, mean_over_tokens, real_tokens


def load_balance(
    records: LayerRecord | Sequence[LayerRecord],
    load_LE: Tensor | None = None,
    tokens: Tensor | float | None = None,
) -> Tensor:
    """Load-balance loss E * sum_i f_i P_i (Fedus et al., arXiv 2101.03961, eq. 4); 1 at uniform routing,
    differentiable in P.

    Args:
        records: one record, or one per layer.
        load_LE: [L, E] shares f to use in place of this batch's, for balance over a global batch.
        tokens: what P is divided by in place of this batch's tokens. With the mean number of tokens of a
            rank, and f of all ranks, the mean over the ranks is the loss of the global batch.

    Returns:
        [L], or a scalar for a single record. Zero where every token is padding.
    """
    if isinstance(records, LayerRecord):
        return _balance(records, None if load_LE is None else load_LE.reshape(-1), tokens)
    if not records:
        return torch.zeros(0)
    return torch.stack(
        [_balance(one, None if load_LE is None else load_LE[i], tokens) for i, one in enumerate(records)]
    )


def _balance(record: LayerRecord, load_E: Tensor | None, tokens: Tensor | float | None) -> Tensor:
    share_E = load(record) if load_E is None else load_E
    mean_E = mean_over_tokens(record.routing.probs_TE, real_tokens(record), tokens)
    return record.routing.num_experts * (share_E * mean_E).sum()
