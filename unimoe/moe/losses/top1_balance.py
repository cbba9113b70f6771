"""Load balance of a nearly hard choice.

Shapes: T tokens, E experts, L layers. Padding tokens count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, across_layers, alone


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
    totals = across_layers([one.total(row_TX) for one, row_TX in zip(records, rows, strict=True)], across)
    tokens_L = across(torch.stack([one.tokens for one in records]))
    losses = []
    for total_X, tokens in zip(totals, tokens_L, strict=True):
        mean_X = total_X / tokens.clamp(min=1)
        f_E, best = mean_X[:-1], mean_X[-1]
        losses.append(len(f_E) * f_E.square().sum() / best.clamp(min=1e-9))
    return torch.stack(losses)
