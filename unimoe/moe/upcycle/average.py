"""Uniform mean of models of one architecture (BTX, arXiv 2403.07816; BAM, arXiv 2408.08274)."""

from collections.abc import Sequence

import torch
from torch import nn

from unimoe.errors import UserError


@torch.no_grad()
def average_weights(model: nn.Module, sources: Sequence[nn.Module]) -> None:
    """Give ``model``, in place, the mean of the weights of ``sources``.

    Raises:
        UserError: a source lacks a weight of the model or has it in another shape.
    """
    states = [source.state_dict() for source in sources]
    for name, own in model.state_dict().items():
        found = [state.get(name) for state in states]
        for slot, weight in enumerate(found):
            if weight is None or weight.shape != own.shape:
                shape = "nothing" if weight is None else list(weight.shape)
                raise UserError(f"model {slot} has {shape} at {name}, expected {list(own.shape)} as the base")
        if own.is_floating_point():
            mean = torch.stack([weight.to(own) for weight in found if weight is not None]).mean(0)
            own.copy_(mean)
