"""What training asks of a model, ours or any of transformers: the supervised loss, the auxiliary losses, and
which parts it consists of.

Shapes: B rows, T tokens of a row, H hidden, P positions, K supervised tokens of a batch, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.moe import LayerRecord, auxiliary_loss
from unimoe.moe.install import moe_layers
from unimoe.moe.losses.auxiliary import Across, alone

from .configuration import IGNORED
from .host import find_decoder, logits_to_keep, towers
from .host_packing import packed_positions
from .loss import cross_entropy_sum
from .modeling import UniMoeForConditionalGeneration
from .structure import StructureConfig


def is_stock(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own."""
    return not isinstance(model, UniMoeForConditionalGeneration)


def answer_loss(model: Any, batches: Sequence[Mapping[str, Any]]) -> tuple[Tensor, int]:
    """Mean cross-entropy over the supervised tokens of several collated batches together, and their number.

    Auxiliary losses are not part of it. For one batch it is ``model(**batch).loss`` of a stock model.
    """
    if not is_stock(model):
        return model.answer_loss(batches)
    total, count = torch.zeros((), device=model.device), 0
    for batch in batches:
        logits_KV, labels_K = supervised_logits(model, batch)
        total = total + cross_entropy_sum(logits_KV, labels_K)
        count += len(labels_K)
    return total / max(count, 1), count


def supervised_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [K, V] of a stock model at the positions before supervised tokens, and these tokens [K].

    Its head runs at positions where a row of the batch has one, if its ``forward`` can be told so.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels_BT = batch["labels"][:, 1:]
    at_P = (labels_BT != IGNORED).any(0).nonzero()[:, 0]
    kept = logits_to_keep(model, at_P)
    if "position_ids" in inputs:
        inputs["position_ids"] = packed_positions(model, inputs)
    logits_BPV = model(**inputs, **kept, use_cache=False).logits
    if not kept:
        logits_BPV = logits_BPV[:, at_P]
    keep_BP = labels_BT[:, at_P] != IGNORED
    return logits_BPV[keep_BP], labels_BT[:, at_P][keep_BP]


def answer_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [K, V] in float32 and labels [K] of a collated batch."""
    if not is_stock(model):
        return model.answer_logits(batch)
    logits_KV, labels_K = supervised_logits(model, batch)
    return logits_KV.float(), labels_K


def last_hidden(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """[B, T, H] of a collated batch, with or without labels, before the head."""
    if not is_stock(model):
        return model.last_hidden(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    seen: list[Tensor] = []
    hook = find_decoder(model).register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    try:
        model(**inputs, **logits_to_keep(model), use_cache=False)
    finally:
        hook.remove()
    return seen[0]


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


def front(model: Any) -> list[nn.Module]:
    """Towers and connectors: everything in front of the decoder."""
    if is_stock(model):
        return list(towers(model).values())
    return [*model.model.encoders.values(), *model.model.connectors.values()]
