"""Load balance of a gate that becomes sparse.

Shapes: T tokens, E experts, L layers. Padding tokens count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, across_layers, alone


@LOSSES.register("dts_balance", source="EvoMoE, arXiv 2112.14397; topkgate.py", axis="load balance")
def dts_balance(
    records: Sequence[LayerRecord], layers: Mapping[int, Any] | None = None, across: Across = alone
) -> Tensor:
    """E * sum_i w_i a_i: w the mean weight of expert i, a the share of tokens that visit it: [L].

    E where every token visits all experts, 1 for a balanced choice of one, E where all choose the same one;
    so it falls as the gate becomes sparse, and measures balance only once it is.
    """
    rows = [torch.cat([one.routing.dense(), one.routing.chosen().float()], dim=1) for one in records]
    totals = across_layers([one.total(row_TX) for one, row_TX in zip(records, rows, strict=True)], across)
    tokens_L = across(torch.stack([one.tokens for one in records]))
    losses = []
    for total_X, tokens in zip(totals, tokens_L, strict=True):
        w_E, a_E = (total_X / tokens.clamp(min=1)).chunk(2)
        losses.append(len(w_E) * (w_E * a_E).sum())
    return torch.stack(losses)
