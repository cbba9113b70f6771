"""Chunked prefill, and the running batch: one KV cache that rows join and leave between two steps.

Shapes: B rows, T tokens of a prompt, L cached positions of the longest row, H hidden, V vocabulary. Rows end
at the same place and are padded on the left:

    . . a b c | d      L = 5, lengths (3, 5, 4)
    e f g h i | j
    . k l m n | o

Why not transformers' continuous batching (``generate_batch``): it takes token ids only, so no media;
shares the cache between prompts of equal ids, which two prompts with different images have; and has one
seed for all.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from unimoe.compress.decoding import Decoding
from unimoe.model.host import is_stock, logits_to_keep
from unimoe.model.modeling import UniMoeForConditionalGeneration, UniMoePreTrainedModel
from unimoe.model.utils import to_device

P = TypeVar("P", bound="Prefill")


class Prefill(Protocol):
    """A prompt on its way into the cache."""

    def advance(self, tokens: int) -> tuple[int, Tensor | None]:
        """Prefill at most ``tokens`` more tokens.

        Returns:
            How many were processed, and the logits [V] once the prompt is complete, else None.
        """
        ...


class Decoder(Protocol[P]):
    """What the engine runs answers on: :class:`unimoe.serve.routed_batch.RoutedBatch` in torch, and
    :class:`unimoe.inference.llama.LlamaBatch` in llama.cpp."""

    def prompt(self, inputs: Mapping[str, Any], decoding: Decoding) -> P:
        """Begin a prompt, a batch of one row with its media; one is under way at a time."""
        ...

    def join(self, prompt: P) -> None:
        """Add a row whose prompt is complete."""
        ...

    def step(self, tokens: list[int]) -> Tensor:
        """Append one token to each row; the logits [B, V] of the next tokens."""
        ...

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        ...


def can_batch(model: UniMoePreTrainedModel) -> bool:
    """Whether every layer has a plain cache, in which rows can be padded (no window, no recurrence)."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


class Prompt:
    """Chunked prefill of one prompt into a KV cache of its own; its media are encoded first.

    Prompts are prefilled one by one, so that the start of a row does not depend on its neighbours.
    """

    def __init__(self, model: UniMoeForConditionalGeneration, inputs: Mapping[str, Any]):
        inputs = {name: to_device(value, model.device) for name, value in inputs.items()}
        self.model = model
        self.ids_1T: Tensor = inputs.pop("input_ids")
        inputs.pop("attention_mask", None)
        self.positions_41T: Tensor | None = inputs.pop("position_ids", None)
        """Positions for models with ``rope_sections``; None for all others."""
        self.ahead = 0
        """Excess of the rotary position of the first generated token over its index."""
        if self.positions_41T is not None:
            self.ahead = int(self.positions_41T[1:].max()) + 1 - self.ids_1T.shape[1]
        self.embeds_1TH = model.model.embed(self.ids_1T, **inputs)
        self.cache = DynamicCache(config=model.config)
        self.done = 0

    def advance(self, tokens: int) -> tuple[int, Tensor | None]:
        """Run more tokens as :meth:`Prefill.advance` does."""
        chunk = slice(self.done, min(self.done + tokens, self.ids_1T.shape[1]))
        output = self.model(
            input_ids=self.ids_1T[:, chunk],
            inputs_embeds=self.embeds_1TH[:, chunk],
            position_ids=None if self.positions_41T is None else self.positions_41T[..., chunk],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.done = chunk.stop
        return chunk.stop - chunk.start, output.logits[0, -1] if self.done == self.ids_1T.shape[1] else None


class StockPrompt:
    """Prefill of one prompt of a model of transformers, at once: some let the tokens of an image see one
    another, or add features of images in later layers."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any]):
        self.model: Any = model
        self.inputs = {name: to_device(value, model.device) for name, value in inputs.items()}
        self.cache = DynamicCache(config=model.config)
        self.ahead = 0
        """Excess of the rotary position, as in :class:`Prompt`."""

    def advance(self, tokens: int) -> tuple[int, Tensor | None]:
        """Run all tokens at once, in the place of :meth:`Prefill.advance`."""
        cached = {"past_key_values": self.cache, "use_cache": True}
        parts: tuple[Any, ...] = (self.model, getattr(self.model, "model", None))
        owners = [one for one in parts if hasattr(one, "rope_deltas")]
        for owner in owners:
            owner.rope_deltas = None  # of the prompt before, which one without media would leave
        output = self.model(**self.inputs, **cached, **logits_to_keep(self.model))
        for owner in owners:
            self.ahead = 0 if owner.rope_deltas is None else int(owner.rope_deltas.flatten()[0])
        return self.inputs["input_ids"].shape[1], output.logits[0, -1]


class RunningBatch:
    """Rows whose prompts are prefilled; each :meth:`step` decodes one token of every row."""

    def __init__(self, model: UniMoeForConditionalGeneration):
        self.model = model
        self.cache: DynamicCache | None = None
        self.lengths: list[int] = []
        """Cached positions of each row, without padding."""
        self.ahead: list[int] = []
        """See :class:`Prompt`."""

    def prompt(self, inputs: Mapping[str, Any]) -> "Prompt | StockPrompt":
        """Encode the media of a prompt, a batch of one row."""
        return StockPrompt(self.model, inputs) if is_stock(self.model) else Prompt(self.model, inputs)

    def join(self, prompt: "Prompt | StockPrompt") -> None:
        """Add a row whose prompt is complete."""
        cache = prompt.cache
        length = cache.get_seq_length()
        longest = max([length, *self.lengths])
        for ours, new in zip(_layers(self.cache), _layers(cache), strict=False):
            new.keys = torch.cat([_pad_left(ours.keys, longest), _pad_left(new.keys, longest)])
            new.values = torch.cat([_pad_left(ours.values, longest), _pad_left(new.values, longest)])
        self.cache = cache
        self.lengths.append(length)
        self.ahead.append(prompt.ahead)

    def step(self, tokens: list[int]) -> Tensor:
        """Append one token to each row.

        Returns:
            The logits [B, V] of the next tokens.
        """
        device = self.model.device
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
        past = max(self.lengths)
        mask_BL = torch.arange(past + 1, device=device) >= past - lengths_B1
        positions = lengths_B1
        if any(self.ahead) or getattr(self.model.config, "rope_sections", None):
            positions = lengths_B1 + torch.tensor(self.ahead, device=device)[:, None]
            positions = torch.stack([lengths_B1, positions, positions, positions])
        output = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=mask_BL.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **logits_to_keep(self.model),
        )
        self.lengths = [length + 1 for length in self.lengths]
        return output.logits[:, -1]

    def keep(self, rows: list[int]):
        """Keep only these rows, in this order."""
        if rows == list(range(len(self.lengths))):
            return
        before = max(self.lengths)
        self.lengths = [self.lengths[row] for row in rows]
        self.ahead = [self.ahead[row] for row in rows]
        if not rows:
            self.cache = None
            return
        padding = before - max(self.lengths)
        for layer in _layers(self.cache):
            layer.keys = layer.keys[rows, :, padding:]
            layer.values = layer.values[rows, :, padding:]


def _layers(cache: DynamicCache | None) -> list[Any]:
    """Each with ``keys`` and ``values`` [B, heads, L, width]."""
    return [] if cache is None else cache.layers


def _pad_left(states: Tensor, length: int) -> Tensor:
    """[B, heads, length, width] with zeros before the cached positions, which the mask hides."""
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[2], 0))
