"""Samples -> what the model's forward takes, with labels on the assistant's words only.

    list[Sample] -> processor.encode (decodes media, one sample) -> labels, length -> processor.pad -> batch

Shapes: B rows, T tokens, M encoder items (pictures, speech windows), S encoder positions, D encoder width.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.configuration import PLACEHOLDERS
from unimoe.encoders import num_tokens
from unimoe.errors import UserError

from .features import FeatureCache
from .media import describe
from .sample import Message, Part, Sample

IGNORED = -100
"""The label of a position that is not learned."""


class Collator:
    """Makes a batch: ``input_ids``, ``attention_mask``, ``labels`` [B, T] padded on the right, and for the
    modalities present ``pixel_values`` [M, 3, H, W], ``video_pixels`` [M, frames, 3, H, W] and
    ``video_frames`` [M], ``speech_features`` [M, mel bins, frames] and ``speech_frames`` [M], and the same of
    ``audio``. Media of the kinds in ``features`` come as ``encoded_media`` instead, kind ->
    (features [M, S, D], lengths [M] or None), read from the cache without being decoded.

    ``labels`` equal ``input_ids`` on assistant text with its end-of-turn token, and are -100 everywhere else.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        features: FeatureCache | None = None,
        truncate: bool = False,
    ) -> None:
        """``processor`` is a UniMoeProcessor. A sample of more than ``max_length`` tokens is a UserError, or
        with ``truncate`` is cut on the right, which must leave all its media and something to learn."""
        self.processor = copy.copy(processor)
        self.max_length = max_length
        self.features = features
        self.truncate = truncate
        self._media_ids = set(processor.tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS.values())))
        self._stored: dict[str, _StoredFeatures] = {}
        if features is not None:
            for kind in sorted(features.kinds):
                has_lengths = len(processor.preprocessors[kind].outputs) > 1
                connector = processor.modalities[kind]["connector"]
                self._stored[kind] = _StoredFeatures(kind, connector, has_lengths)
            self.processor.preprocessors = {**processor.preprocessors, **self._stored}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Encode and pad. Raises UserError that names the sample at fault."""
        return self._batch(self._encode(samples))

    def by_length(self, samples: Sequence[Sample], waste: float = 0.25) -> list[dict[str, Any]]:
        """The samples as batches of rows of like length, none of more than about ``waste`` padding.

        A short question beside a long text would otherwise cost as much as the text.
        """
        parts: list[list[tuple[dict[str, Any], list[int]]]] = []
        tokens = 0
        for row in sorted(self._encode(samples), key=lambda row: len(row[1])):
            length = len(row[1])
            if not parts or (tokens + length) < (1 - waste) * length * (len(parts[-1]) + 1):
                parts.append([])
                tokens = 0
            parts[-1].append(row)
            tokens += length
        return [self._batch(part) for part in parts]

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Conversations that wait for an answer as one batch, padded on the left, without labels."""
        rows = [self.processor.encode(self._messages(sample), True, sample.source) for sample in samples]
        return self._pad(rows, "left")

    def _encode(self, samples: Sequence[Sample]) -> list[tuple[dict[str, Any], list[int]]]:
        """Inputs and labels of each sample."""
        rows = []
        for sample in samples:
            one = self.processor.encode(self._messages(sample), where=sample.source)
            mask = one.pop("assistant_mask")
            self._fit(one["input_ids"], mask, sample)
            if not any(mask):
                raise UserError(f"{sample.source}: there is no assistant text to learn from")
            pairs = zip(one["input_ids"], mask, strict=True)
            rows.append((one, [token if learned else IGNORED for token, learned in pairs]))
        return rows

    def _batch(self, rows: list[tuple[dict[str, Any], list[int]]]) -> dict[str, Any]:
        batch = self._pad([encoded for encoded, _ in rows], "right")
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
        return batch

    def _pad(self, rows: list[dict[str, Any]], side: str) -> dict[str, Any]:
        batch = dict(self.processor.pad(rows, side))
        present = [kind for kind, stored in self._stored.items() if stored.outputs[0] in batch]
        if present:
            batch["encoded_media"] = {kind: self._stored[kind].take(batch) for kind in present}
        return batch

    def _fit(self, input_ids: list[int], mask: list[int], sample: Sample) -> None:
        if self.max_length is None or len(input_ids) <= self.max_length:
            return
        length = len(input_ids)
        found = f"{sample.source}: the sample has {length} tokens, more than max_length {self.max_length}"
        if not self.truncate:
            raise UserError(f"{found}; raise max_length, set truncate, or leave the sample out")
        if self._media_ids.intersection(input_ids[self.max_length :]) or not any(mask[: self.max_length]):
            raise UserError(f"{found}, and cutting it would take away media or all assistant text")
        del input_ids[self.max_length :], mask[self.max_length :]

    def _messages(self, sample: Sample) -> list[Message]:
        """The messages with stored features, where there is a cache, in the place of media."""
        if self.features is None:
            return sample.messages
        cache = self.features

        def stored(part: Part) -> Part:
            kind = part["type"]
            if kind not in self._stored:
                return part
            windows = cache.get(cache.key(part, sample.source))
            if windows is None:
                missing = f"{describe(part)} is not in the feature cache {cache.folder}"
                raise UserError(f"{sample.source}: {missing}; fill it first")
            return {"type": kind, kind: windows}

        return [{**turn, "content": [stored(part) for part in turn["content"]]} for turn in sample.messages]


class _StoredFeatures:
    """Stands in for a preprocessor of the processor: takes the list of features [S, D] of one medium."""

    def __init__(self, kind: str, connector: dict[str, Any], has_lengths: bool) -> None:
        self.kind = kind
        self.outputs = (f"{kind}_encoded", f"{kind}_lengths")
        self.connector = connector
        self.has_lengths = has_lengths

    def load(self, part: Part, where: str) -> list[Tensor]:
        return part[self.kind]

    def __call__(self, windows: list[Tensor]) -> tuple[dict[str, list[Tensor]], int]:
        values = windows, [torch.tensor(len(window)) for window in windows]
        tokens = sum(num_tokens(self.connector, len(window)) for window in windows)
        return dict(zip(self.outputs, values, strict=True)), tokens

    def take(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Remove this kind from ``batch``: what the encoder would have returned."""
        features_MSD, lengths_M = (batch.pop(name) for name in self.outputs)
        return features_MSD, lengths_M if self.has_lengths else None
