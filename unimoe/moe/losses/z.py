"""The router z-loss.

Shapes: T tokens, L layers. Padding tokens count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, alone


@LOSSES.register("z", source="ST-MoE, arXiv 2202.08906, eq. 5", axis="router regularisation")
def z_loss(
    records: Sequence[LayerRecord], layers: Mapping[int, Any] | None = None, across: Across = alone
) -> Tensor:
    """Router z-loss, mean of logsumexp(logits)^2: [L]."""
    if not records:
        return torch.zeros(0)
    z_L = [one.total(one.routing.logits_TE.logsumexp(dim=-1).square()[:, None]) for one in records]
    tokens_L = [one.tokens[None] for one in records]
    return across(torch.cat(z_L)) / across(torch.cat(tokens_L)).clamp(min=1)
