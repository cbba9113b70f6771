"""The load-balance loss.

With uniform probabilities it is 1 whatever the load is, so the loss says nothing about the load: measure
that with ``expert_load``.

Shapes: E experts, L layers. Padding tokens count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.moe.load_counts import ExpertLoad, expert_load
from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, alone


@LOSSES.register("balance", source="Switch Transformer, arXiv 2101.03961, eq. 4", axis="load balance")
def load_balance(
    records: Sequence[LayerRecord], layers: Mapping[int, Any] | None = None, across: Across = alone
) -> Tensor:
    """Load-balance loss E * sum_i f_i P_i; 1 at uniform routing, differentiable in P.

    f is the share of the pairs and P the mean probability of an expert, both over the batches of all
    processes (global-batch balance, arXiv 2501.11873).

    Returns:
        [L]. Zero where every token is padding.
    """
    if not records:
        return torch.zeros(0)
    loads = [expert_load(record) for record in records]
    counts = [torch.cat([load.tokens_per_expert, torch.as_tensor(load.tokens)[None]]) for load in loads]
    totals_LE = across(torch.stack([one.total(one.routing.probs_TE) for one in records]))
    losses = []
    for counts_X, total_E in zip(across(torch.stack(counts)), totals_LE, strict=True):
        pairs_E, tokens = counts_X[:-1], counts_X[-1]
        share_E, mean_E = ExpertLoad(pairs_E).share, total_E / tokens.clamp(min=1)
        losses.append(len(share_E) * (share_E * mean_E).sum())
    return torch.stack(losses)
