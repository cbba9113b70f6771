"""A mixture keeps the experts that are used most (Z-code M3's pruning of experts).

Shapes: E experts with weights, or more with null experts behind them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.install import moe_layers
from unimoe.moe.load_counts import ExpertLoad

from .rows import expert_rows, set_expert_rows


@torch.no_grad()
def prune_by_use(model: Any, loads: Mapping[int, ExpertLoad], copies: int) -> dict[int, Tensor]:
    """Keep the ``copies`` most used copies of each FFN, with their rows of the router, in place (arXiv
    2109.10465, section 4.3).

    A copy's use is that of all its slices, so a sliced FFN stays whole.

    Args:
        model: with MoE layers, and their configuration as ``config.moe``.
        loads: the load of each layer on validation data, see ``expert_load``.
        copies: to keep.

    Returns:
        Indices of the experts that were kept, by layer, in their order.

    Raises:
        UserError: fewer copies than a token visits or more than there are, or a layer has no row for each
            expert.
    """
    moe = model.config.moe
    slices, there = moe["experts"]["slices"], moe["experts"]["copies"]
    k = moe["router"].get("k", 1)
    least = -(-max(k if isinstance(k, list) else [k]) // slices)
    if not least <= copies <= there:
        raise UserError(f"{copies} copies are to be kept, expected {least}..{there}")
    layers = moe_layers(model)
    rows = {index: expert_rows(layer) for index, layer in layers.items()}
    kept = {}
    for index, layer in layers.items():
        use_C = loads[index].tokens_per_expert[: layer.num_experts].reshape(there, slices).sum(1)
        best_C = use_C.topk(copies).indices.sort().values
        kept[index] = (best_C[:, None] * slices + torch.arange(slices, device=best_C.device)).flatten()
        set_expert_rows(layer, {name: tensor[kept[index]] for name, tensor in rows[index].items()})
    model.config.moe = {**moe, "experts": {**moe["experts"], "copies": copies}}
    return kept
