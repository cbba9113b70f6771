"""Several samples in one row, without attention between them, for models of transformers.

transformers tells packed samples apart by ``position_ids`` that begin again with each (without a mask and a
cache). Models with positions in time and space take four of each token: one that begins again, and their own
three, of which only differences within a sample matter.

Shapes: B rows (1), T tokens of a row.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.errors import UserError

from .host import logits_to_keep


def packed_positions(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The positions that a model needs for a packed batch: [B, T], or [4, B, T] with m-rope.

    Args:
        model: one of transformers.
        batch: with ``position_ids`` [B, T] that begin again with each sample.
    """
    own = _rope_index(model)
    if own is None:
        return batch["position_ids"]
    known = inspect.signature(own).parameters
    given = {name: value for name, value in batch.items() if name in known}
    given.setdefault("mm_token_type_ids", torch.zeros_like(batch["input_ids"]))
    positions_3BT, _ = own(**given)
    return torch.cat([batch["position_ids"][None], positions_3BT])


def _rope_index(model: nn.Module) -> Any:
    """What computes a model's positions in time, height and width; None if it has none."""
    parts = (model, getattr(model, "model", None))
    return next((found for part in parts if (found := getattr(part, "get_rope_index", None))), None)


@torch.no_grad()
def check_packing(model: Any) -> None:
    """See that a sample gives the same logits behind another one as alone.

    Raises:
        UserError: it does not.
    """
    refused = f"data.pack: {type(model).__name__} cannot be trained on packed samples"
    own = _rope_index(model)
    if own is not None and "mm_token_type_ids" not in inspect.signature(own).parameters:
        raise UserError(f"{refused}: it places media by other inputs than its tokens; leave it out")
    known = inspect.signature(model.forward).parameters
    if "position_ids" not in known:
        raise UserError(f"{refused}: it takes no position_ids; leave it out")
    if "token_type_ids" in known:  # the masks of packed rows look these up at places of the first sample
        raise UserError(f"{refused}: tokens of an image see one another; leave it out")
    ids_1T = torch.arange(24, device=model.device)[None] % model.config.get_text_config().vocab_size
    places_1T = torch.cat([ids_1T.new_tensor(range(8)), ids_1T.new_tensor(range(16))])[None]
    places = packed_positions(model, {"input_ids": ids_1T, "position_ids": places_1T})
    rest = logits_to_keep(model) | {"use_cache": False}
    training = model.training
    model.eval()
    behind = model(input_ids=ids_1T, position_ids=places, **rest).logits[0, -1]
    alone = model(input_ids=ids_1T[:, 8:], **rest).logits[0, -1]
    model.train(training)
    if (behind - alone).abs().max() > 1e-3 * alone.abs().max():
        raise UserError(f"{refused}: its attention does not tell them apart; leave it out")
