"""The losses of a model, ours or one of transformers: next-token cross-entropy over the tokens with a label,
and the auxiliary losses of its MoE layers.

Shapes: B rows, T tokens of a row, X hidden size or vocabulary, S supervised tokens of a batch, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from unimoe.moe import LayerRecord, auxiliary_loss
from unimoe.moe.install import moe_layers
from unimoe.moe.losses.auxiliary import Across, alone

from .configuration import IGNORED
from .host import is_stock
from .structure import StructureConfig


def supervised(states_BTX: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The states that predict a supervised token, and that token.

    Returns:
        states [S, X], of the position before each token with a label, and the labels [S].
    """
    labels_BT = labels_BT[:, 1:]
    keep_BT = labels_BT != IGNORED
    return states_BTX[:, :-1][keep_BT], labels_BT[keep_BT]


def cross_entropy_sum(logits_SV: Tensor, labels_S: Tensor) -> Tensor:
    """Sum over the supervised tokens (0-d), computed in float32."""
    return nnf.cross_entropy(logits_SV.float(), labels_S, reduction="sum")


def cross_entropy(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """Mean over the supervised tokens of all batches together (0-d), and their number.

    Args:
        parts: logits [S, V] and labels [S] of each batch. Without a label the mean is 0.
    """
    total, count = torch.zeros(()), 0
    for logits_SV, labels_S in parts:
        total = total + cross_entropy_sum(logits_SV, labels_S)
        count += len(labels_S)
    return total / max(count, 1), count


def moe_settings(model: nn.Module) -> dict[str, Any] | None:
    """The configuration of the MoE layers as the model will save it (not a copy); None for a dense model."""
    config: Any = model.config
    if not is_stock(model):
        return config.moe
    structure = getattr(config, "quantization_config", None)
    return structure.moe if isinstance(structure, StructureConfig) else None


def aux_loss(
    model: nn.Module,
    records: Sequence[LayerRecord],
    across: Across = alone,
    losses: Mapping[str, Any] | None = None,
) -> Tensor:
    """Sum of the auxiliary losses over the recorded MoE layers (0-d; 0 for a dense model).

    Args:
        model: whose layers were recorded.
        records: one of each MoE layer.
        across: the mean over processes, see :data:`unimoe.moe.losses.auxiliary.Across`.
        losses: to use in place of the configuration's.
    """
    settings = moe_settings(model)
    if not records or not settings:
        return torch.zeros((), device=model.device)  # type: ignore[arg-type]
    return auxiliary_loss(
        settings["losses"] if losses is None else losses, records, moe_layers(model), across
    )
