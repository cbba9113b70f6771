"""Small helpers around a model."""

from typing import Any

import torch
from torch import nn

from unimoe.moe.install import moe_layers


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters of a model, and the active ones: without the experts that are not chosen for a token."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        experts = sum(parameter.numel() for parameter in layer.experts.parameters())
        chosen = getattr(layer.router, "k", layer.experts.num_experts)
        idle += experts - experts * chosen // layer.experts.num_experts
    return total, total - idle


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, also inside dicts and tuples, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return tuple(to_device(item, device) for item in value) if isinstance(value, tuple) else value
