"""What a model, ours or any of transformers, makes of a collated batch: loss, logits, hidden states.

Shapes: B rows, T tokens of a row, H hidden, P positions, K supervised tokens of a batch, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .configuration import IGNORED
from .host import find_decoder, is_stock, logits_to_keep
from .host_packing import packed_positions
from .loss import cross_entropy, supervised


def answer_loss(model: Any, batches: Sequence[Mapping[str, Any]]) -> tuple[Tensor, int]:
    """Mean cross-entropy over the supervised tokens of several collated batches together, and their number.

    Auxiliary losses are not part of it. For one batch it is ``model(**batch).loss`` of a stock model.
    """
    return cross_entropy(answer_logits(model, batch) for batch in batches)


def answer_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [K, V] in float32 and labels [K] of a collated batch; the head runs at these positions only."""
    if is_stock(model):
        logits_KV, labels_K = _stock_logits(model, batch)
    else:
        hidden_KH, labels_K = supervised(last_hidden(model, batch), batch["labels"])
        logits_KV = model.head(hidden_KH)
    return logits_KV.float(), labels_K


def _stock_logits(model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits and labels of a stock model; the head runs at positions where a row of the batch has a label, if
    ``forward`` can be told so."""
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


def last_hidden(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """[B, T, H] of a collated batch, with or without labels, before the head."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not is_stock(model):
        return model.model(**inputs, use_cache=False).last_hidden_state
    seen: list[Tensor] = []
    hook = find_decoder(model).register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    try:
        model(**inputs, **logits_to_keep(model), use_cache=False)
    finally:
        hook.remove()
    return seen[0]
