"""Samples -> what the model's forward takes, with labels on the assistant's words only.

    list[Sample] -> processor.encode (decodes media, one sample) -> labels, length -> processor.pad -> batch
"""

from collections.abc import Sequence
from typing import Any

import torch

from unimoe.configuration import PLACEHOLDERS
from unimoe.errors import UserError

from .features import FeatureCache
from .sample import Sample

IGNORED = -100
"""The label of a position that is not learned."""


class Collator:
    """Makes a batch of samples: ``input_ids``, ``attention_mask``, ``labels`` [B, T] padded on the right, and for
    the modalities present ``pixel_values`` [images, 3, H, W], ``speech_features`` [windows, mels, frames] and
    ``speech_frames`` [windows]; with ``features``, ``encoded_media`` in their place.

    ``labels`` equal ``input_ids`` on assistant text with its end-of-turn token, and -100 everywhere else.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        features: FeatureCache | None = None,
        truncate: bool = False,
    ) -> None:
        """``processor`` is a UniMoeProcessor. A sample of more than ``max_length`` tokens is a UserError, or with
        ``truncate`` is cut on the right, which must leave all its media and something to learn."""
        self.processor = processor if features is None else features.attach(processor)
        self.max_length = max_length
        self.features = features
        self.truncate = truncate
        self._media_ids = {processor.tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS.values()}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        encoded, labels = [], []
        for sample in samples:
            messages = sample.messages if self.features is None else self.features.substitute(sample)
            one = self.processor.encode(messages, where=sample.source)
            mask = one.pop("assistant_mask")
            self._fit(one, mask, sample)
            if not any(mask):
                raise UserError(f"{sample.source}: there is no assistant text to learn from")
            encoded.append(one)
            labels.append([token if keep else IGNORED for token, keep in zip(one["input_ids"], mask, strict=True)])
        batch = dict(self.processor.pad(encoded))
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels])
        return batch if self.features is None else self.features.gather(batch)

    def _fit(self, one: dict[str, Any], mask: list[int], sample: Sample) -> None:
        length = len(one["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return
        found = f"{sample.source}: the sample has {length} tokens, more than max_length {self.max_length}"
        if not self.truncate:
            raise UserError(f"{found}; raise max_length, set truncate, or leave the sample out")
        if self._media_ids.intersection(one["input_ids"][self.max_length :]) or not any(mask[: self.max_length]):
            raise UserError(f"{found}, and cutting it would take away media or all assistant text")
        del one["input_ids"][self.max_length :], mask[self.max_length :]
