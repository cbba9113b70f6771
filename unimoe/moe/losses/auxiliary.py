"""The contract of auxiliary losses, and those of a configuration as one number.

Shapes: L layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

if TYPE_CHECKING:
    from unimoe.moe.layer import MoELayer

Across = Callable[[Tensor], Tensor]
"""The mean of a tensor over the processes of a run, whose gradient is that of this process's share. A loss
that is a function of such means is that of the global batch, and so are its gradients once they are averaged
over the processes (DDP, FSDP2). It must be called equally often, and with equal shapes, on each process."""


class AuxiliaryLoss(Protocol):
    """A loss over the recorded routing of a step."""

    def __call__(
        self,
        records: Sequence[LayerRecord],
        layers: "Mapping[int, MoELayer]",
        across: Across,
        **settings: Any,
    ) -> Tensor:
        """[L] or a scalar, differentiable.

        Args:
            records: one of each MoE layer (at least one), in order.
            layers: the layers by the index of their records, for losses that need weights.
            across: see ``Across``.
            settings: of the loss.
        """
        ...


def alone(values: Tensor) -> Tensor:
    """``Across`` of a single process."""
    return values


def across_layers(values: Sequence[Tensor], across: Across) -> list[Tensor]:
    """``across`` of a vector of each layer, in one call; their lengths, numbers of experts, may differ."""
    return list(across(torch.cat([*values])).split([len(one) for one in values]))


def auxiliary_loss(
    losses: Mapping[str, Any],
    records: Sequence[LayerRecord],
    layers: "Mapping[int, MoELayer] | None" = None,
    across: Across = alone,
) -> Tensor:
    """The configured auxiliary losses (``MoEConfig.losses``), weighted and summed over the layers: 0-d.

    Args:
        losses: name -> coefficient, or ``{coef: 0.01, ...settings}``. A coefficient of 0 computes nothing.
        records: one of each MoE layer, at least one.
        layers: as of :class:`AuxiliaryLoss`; only some losses need them.
        across: see ``Across``.
    """
    total = records[0].routing.logits_TE.new_zeros(())
    for name, given in losses.items():
        settings = dict(given) if isinstance(given, Mapping) else {"coef": given}
        if coefficient := settings.pop("coef"):
            loss = LOSSES.find(name).build(records, layers or {}, across, **settings)
            total = total + coefficient * loss.sum()
    return total
