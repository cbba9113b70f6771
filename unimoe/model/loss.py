"""Cross-entropy over the tokens that are learned; the LM head runs at their positions alone.

Shapes: B rows, T tokens of a row, S supervised tokens of a batch, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from .configuration import IGNORED
from .modeling import UniMoeForConditionalGeneration


def last_hidden(model: UniMoeForConditionalGeneration, part: dict[str, Any]) -> Tensor:
    """[B, T, H] of a collated batch, with or without labels."""
    inputs = {name: value for name, value in part.items() if name != "labels"}
    return model.model(**inputs, use_cache=False).last_hidden_state


def answer_logits(model: UniMoeForConditionalGeneration, part: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Logits [S, V] in float32 and labels [S] of a collated batch."""
    labels_BT = part["labels"][:, 1:]
    keep_BT = labels_BT != IGNORED
    return model.head(last_hidden(model, part)[:, :-1][keep_BT]).float(), labels_BT[keep_BT]


def answer_loss(model: UniMoeForConditionalGeneration, parts: Sequence[dict[str, Any]]) -> tuple[Tensor, int]:
    """Mean over the supervised tokens of several collated batches together, and their number."""
    total, count = torch.zeros((), device=model.device), 0
    for part in parts:
        logits_SV, labels_S = answer_logits(model, part)
        total = total + nnf.cross_entropy(logits_SV, labels_S, reduction="sum")
        count += len(labels_S)
    return total / max(count, 1), count
