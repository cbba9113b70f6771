"""The frozen layers below the first one with experts: they run once for each sample, not in every step.

Shapes: B rows, T tokens of a row, H hidden size.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unimoe.model.configuration import IGNORED
from unimoe.model.host_loss import last_hidden
from unimoe.model.inputs import Batch
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.utils import to_device

Row = dict[str, Tensor]
"""``input_ids`` and ``labels`` [T] of a sample, and ``inputs_embeds`` [T, H], the trunk's output."""


class _Reached(Exception):
    """The first layer above the trunk was reached."""


class Trunk:
    """Makes the layers below ``first`` pass on what they get: a model then takes the trunk's output as
    ``inputs_embeds``."""

    def __init__(self, model: UniMoeForConditionalGeneration, first: int):
        """
        Args:
            model: its lower layers are changed in place.
            first: index of the first layer that is not part of the trunk.
        """
        self.model, self.skipping = model, True
        layers: Any = model.model.language_model.layers
        self._below = list(layers[:first])
        for layer in self._below:
            layer.forward = partial(self._pass, layer.forward)
        self._hook = layers[first].register_forward_pre_hook(self._catch, with_kwargs=True)
        self._caught: Tensor | None = None

    def remove(self) -> None:
        """Undo the change."""
        self._hook.remove()
        for layer in self._below:
            del layer.forward

    def _pass(self, forward: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self.skipping else forward(hidden_states, *args, **kwargs)

    def _catch(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.skipping:
            self._caught = args[0] if args else kwargs["hidden_states"]
            raise _Reached

    @torch.no_grad()
    def row(self, batch: Mapping[str, Any]) -> Row:
        """Run the trunk on a collated batch of one sample; the result is on the CPU."""
        states_BTH = self.states(batch)
        return {
            "input_ids": batch["input_ids"][0],
            "labels": batch["labels"][0],
            "inputs_embeds": states_BTH[0],
        }

    @torch.no_grad()
    def states(self, batch: Mapping[str, Any]) -> Tensor:
        """[B, T, H] the trunk's output for a batch whose rows have one length, on the CPU."""
        self.skipping = False
        try:
            last_hidden(self.model, to_device(dict(batch), self.model.device))
        except _Reached:
            pass
        finally:
            self.skipping = True
        assert self._caught is not None
        states_BTH, self._caught = self._caught.cpu(), None
        return states_BTH


def batches_of(rows: Sequence[Row]) -> list[Batch]:
    """Rows as batches of similar length, padded on the right, none to more than 4/3 of its length."""
    ordered = sorted(rows, key=lambda row: len(row["labels"]))
    groups: list[list[Row]] = []
    for row in ordered:
        if not groups or len(row["labels"]) > 4 / 3 * len(groups[-1][0]["labels"]):
            groups.append([])
        groups[-1].append(row)
    return [_pad(group) for group in groups]


def _pad(rows: Sequence[Row]) -> Batch:
    def padded(name: str, value: int = 0) -> Tensor:
        return pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

    mask_BT = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {
        "input_ids": padded("input_ids"),
        "labels": padded("labels", IGNORED),
        "inputs_embeds": padded("inputs_embeds"),
        "attention_mask": mask_BT,
    }


def trunk_of(model: UniMoeForConditionalGeneration, first: int) -> Trunk | None:
    """The trunk below layer ``first``; None where there is none, or where the decoder does more to its inputs
    than to run its layers, so that the output would be another."""
    if not first or model.config.rope_sections:
        return None
    ids_BT = torch.arange(12, device=model.device)[None]
    batch = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT}
    with torch.no_grad():
        whole_BTH = last_hidden(model.eval(), batch)
        trunk = Trunk(model, first)
        parts_BTH = last_hidden(model, to_device(batches_of([trunk.row(batch)])[0], model.device))
    close = torch.allclose(whole_BTH, parts_BTH, rtol=1e-3, atol=1e-3 * float(whole_BTH.abs().max()))
    if close:
        return trunk
    trunk.remove()
    return None
