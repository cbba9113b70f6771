"""Load balance of a nearly hard choice.

Shapes: T tokens, E experts, L layers. Padding tokens count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, alone


@LOSSES.register("top1_balance", source="Sigma-MoE-Tiny, arXiv 2512.16248, Top-1 LBL", axis="load balance")
def top1_balance(
    records: Sequence[LayerRecord],
    layers: Mapping[int, Any] | None = None,
    across: Across = alone,
    temperature: float = 1.0,
) -> Tensor:
    """E * sum_i f_i^2 / m: f the mean probability of expert i, m that of a token's most probable expert: [L].

    1 for a sure and balanced choice, E for equal probabilities and where all tokens choose one expert; so it
    cannot be lowered by making probabilities equal, as :func:`~unimoe.moe.losses.balance.load_balance` can.

    Args:
        records: of the layers.
        layers: not read.
        across: mean over processes.
        temperature: temperature of the softmax over logits. The paper names no value.
    """
    probs = [(one.routing.logits_TE / temperature).softmax(dim=-1) for one in records]
    rows = [torch.cat([p_TE, p_TE.amax(dim=1, keepdim=True)], dim=1) for p_TE in probs]
    totals = across(torch.stack([one.total(row_TX) for one, row_TX in zip(records, rows, strict=True)]))
    tokens_L = across(torch.stack([one.tokens for one in records]))
    means = totals / tokens_L.clamp(min=1)[:, None]
    f_LE, best_L = means[:, :-1], means[:, -1]
    return f_LE.shape[1] * f_LE.square().sum(dim=1) / best_L.clamp(min=1e-9)
