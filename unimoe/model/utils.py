"""Small helpers around a model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from unimoe.moe.install import moe_layers
from unimoe.moe.lora_linear import LoRALinear
from unimoe.moe.packed_linear import packed_weights
from unimoe.moe.view import find_layers


def count_parameters(model: nn.Module, visits: Mapping[int, float] | None = None) -> tuple[int, int]:
    """All parameters of a model, and the active ones: without the experts that a token does not visit.
    Packed weights count as what they stand for.

    Args:
        model: dense, with MoE layers, or a mixture of experts of transformers; its projections may have banks
            of low-rank experts.
        visits: measured mean number of experts with weights that a token visits, by MoE layer
            (``RoutingStats.experts_per_token``). None takes what each router says of itself, which for one
            that chooses another number for each token is that of equally probable experts. Routers of banks
            always speak for themselves.
    """
    total = weights(model)
    idle = 0.0
    for index, layer in moe_layers(model).items():
        experts = weights(layer.experts)
        visited = layer.experts_per_token if visits is None else visits[index]
        idle += experts - layer.experts.active_parameters(visited)
    for one in find_layers(model):
        if not one.ours:
            visited = one.top_k if visits is None else visits[one.layer]
            idle += weights(one.experts) * (1 - visited / one.num_experts)
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.num_experts:
            experts = sum(parameter.numel() for parameter in module.banks.parameters())
            idle += experts * (1 - module.experts_per_token / module.num_experts)
    return total, total - round(idle)


def weights(module: nn.Module) -> int:
    """Parameters of a module; packed weights count as what they stand for."""
    return sum(parameter.numel() for parameter in module.parameters()) + packed_weights(module)


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, also inside dicts and tuples, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return tuple(to_device(item, device) for item in value) if isinstance(value, tuple) else value
