"""The router z-loss.

Shapes: T tokens, L layers. Padding tokens count nowhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe.moe.records import LayerRecord, mean_over_tokens, real_tokens


def z_loss(records: LayerRecord | Sequence[LayerRecord], tokens: Tensor | float | None = None) -> Tensor:
    """Router z-loss, mean of logsumexp(logits)^2 (Zoph et al., arXiv 2202.08906, eq. 5): [L], or a scalar for
    a single record. ``tokens`` as in ``load_balance``."""
    if isinstance(records, LayerRecord):
        z_T = records.routing.logits_TE.logsumexp(dim=-1).square()
        return mean_over_tokens(z_T[:, None], real_tokens(records), tokens)[0]
    if not records:
        return torch.zeros(0)
    return torch.stack([z_loss(one, tokens) for one in records])
