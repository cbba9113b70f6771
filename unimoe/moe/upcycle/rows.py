"""What an MoE layer has one row of for each expert: its stacks of weights, and rows of the router.

Shapes: E experts with weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.experts.base import Experts
from unimoe.moe.layer import MoELayer


def expert_rows(layer: MoELayer) -> dict[str, Tensor]:
    """Name in the layer -> its tensor [E, ...], without the rows of null and shared experts.

    Raises:
        UserError: a router or experts that are not made of such rows.
    """
    router, experts = layer.router, layer.experts
    if not router.expert_rows:
        raise UserError(f"layer {layer.layer_index}: {type(router).__name__} has no row for each expert")
    if experts.indivisible:
        raise UserError(f"layer {layer.layer_index}: {type(experts).__name__} {experts.indivisible}")
    names = [f"experts.{name}" for name, _ in experts.named_parameters()]
    tensors = layer.state_dict()
    names += [name for one in router.expert_rows if (name := f"router.{one}") in tensors]
    return {name: tensors[name][: layer.num_experts] for name in names}


@torch.no_grad()
def set_expert_rows(layer: MoELayer, rows: Mapping[str, Tensor]) -> None:
    """Give a layer other experts, in place.

    Args:
        layer: of the model.
        rows: as of :func:`expert_rows`, of another number of experts.
    """
    before, after = layer.num_experts, len(next(iter(rows.values())))
    for name, tensor in rows.items():
        owner, _, attribute = name.rpartition(".")
        module = layer.get_submodule(owner)
        old = getattr(module, attribute)
        whole = torch.cat([tensor, old[before:]])
        parameter = isinstance(old, nn.Parameter)
        setattr(module, attribute, nn.Parameter(whole, old.requires_grad) if parameter else whole)
    for module in layer.experts.modules():
        if isinstance(module, Experts):
            module.num_experts = after
    layer.router.num_experts += after - before
    layer.num_experts = after
