"""The router z-loss.

Shapes: T tokens, L layers. Padding tokens count nowhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe.moe.records import LayerRecord


def z_loss(records: LayerRecord | Sequence[LayerRecord], tokens: Tensor | float | None = None) -> Tensor:
    """Router z-loss, mean of logsumexp(logits)^2 (Zoph et al., arXiv 2202.08906, eq. 5): [L], or a scalar for
    a single record. ``tokens`` divides in place of this batch's number of tokens."""
    if isinstance(records, LayerRecord):
        z_T = records.routing.logits_TE.logsumexp(dim=-1).square()
        return records.mean(z_T[:, None], tokens)[0]
    if not records:
        return torch.zeros(0)
    return torch.stack([z_loss(one, tokens) for one in records])
