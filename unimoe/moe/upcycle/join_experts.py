"""Two mixtures become one with the experts of both (Z-code M3's aggregation of experts)."""

from typing import Any

import torch

from unimoe.errors import UserError
from unimoe.moe.install import moe_layers

from .rows import expert_rows, set_expert_rows


@torch.no_grad()
def join_experts(model: Any, other: Any) -> None:
    """Add the experts of ``other`` to ``model``, in place (arXiv 2109.10465, section 4.2).

    Each MoE layer gets the experts and the router's rows of both, those of ``model`` first; everything else
    becomes the mean of both. The paper names no rule for that rest. A token visits as many experts as before;
    with twice as many, two equal models give the outputs of one.

    Args:
        model: with MoE layers, and their configuration as ``config.moe``.
        other: of the same shapes.

    Raises:
        UserError: the models differ in shape, or a layer has no row for each expert.
    """
    layers, others = moe_layers(model), moe_layers(other)
    if layers.keys() != others.keys() or not layers:
        raise UserError(f"the MoE layers are {list(layers)} and {list(others)}, expected the same")
    pairs = {index: (expert_rows(layer), expert_rows(others[index])) for index, layer in layers.items()}
    state, theirs = model.state_dict(), other.state_dict()
    done = {tensor.data_ptr() for mine, _ in pairs.values() for tensor in mine.values()}
    for name, tensor in state.items():
        if name not in theirs or theirs[name].shape[1:] != tensor.shape[1:]:
            raise UserError(f"{name} is not the same in both models")
        if tensor.data_ptr() not in done and tensor.is_floating_point():
            done.add(tensor.data_ptr())  # tied weights have several names
            if theirs[name].shape != tensor.shape:
                raise UserError(f"{name} is {list(theirs[name].shape)}, expected {list(tensor.shape)}")
            tensor.copy_((tensor.double() + theirs[name].double()) / 2)
    for index, (mine, own) in pairs.items():
        set_expert_rows(layers[index], {name: torch.cat([rows, own[name]]) for name, rows in mine.items()})
    if getattr(model, "config", None) is not None and getattr(model.config, "moe", None):
        experts = {**model.config.moe["experts"]}
        experts["copies"] += other.config.moe["experts"]["copies"]
        model.config.moe = {**model.config.moe, "experts": experts}
