"""Samples -> inputs of the model's forward, with labels on the assistant's tokens only.

    list[Sample] -> processor.encode (decodes media, one sample) -> labels, length -> processor.pad -> batch

With a feature cache, that encodes and pads.

Shapes: B rows, T tokens, M encoder items (images, speech windows), S encoder positions, D encoder width.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import torch

from unimoe.errors import UserError
from unimoe.model.configuration import IGNORED
from unimoe.model.host_processor import is_of_tokens
from unimoe.model.inputs import Batch, EncodedConversation
from unimoe.model.processing import UniMoeProcessor

from .feature_cache import FeatureCache
from .host_features import HostFeatures
from .sample import Sample

log = logging.getLogger(__name__)

Overflow = Literal["error", "truncate", "drop"]
"""What to do with a sample of too many tokens."""

Row = tuple[EncodedConversation, list[int]]
"""A sample's inputs, and its labels [T]."""


class Collator:
    """Makes a batch: ``input_ids``, ``attention_mask``, ``labels`` [B, T] padded on the right, and for the
    modalities present ``pixel_values`` [M, 3, H, W], ``video_pixels`` [M, frames, 3, H, W] and
    ``video_frames`` [M], ``speech_features`` [M, mel bins, frames] and ``speech_frames`` [M], and the same of
    ``audio``. Media of the modalities in ``features`` come as ``encoded_media`` instead, modality ->
    (features [M, S, D], lengths [M] or None), read from the cache without being decoded. Models of
    transformers get what :meth:`HostFeatures.pad` makes of them.

    ``labels`` equal ``input_ids`` on assistant text and its end-of-turn token, and are -100 everywhere else.
    """

    def __init__(
        self,
        processor: UniMoeProcessor,
        max_length: int | None = None,
        features: FeatureCache | HostFeatures | None = None,
        overflow: Overflow = "error",
    ) -> None:
        """
        Args:
            processor: of the model.
            max_length: most tokens of a sample; None for no limit.
            features: cache of frozen encoders' features, filled.
            overflow: what to do with a longer sample: raise ("error"), skip it with a warning ("drop"), or
                truncate it on the right ("truncate"), which must keep all media and some assistant text.
        """
        self.processor = processor
        self.max_length = max_length
        self.features = features
        self.overflow: Overflow = overflow
        self._dropped: set[str] = set()
        self._media_ids = processor.media_ids

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Encode and pad.

        Raises:
            UserError: a sample cannot be encoded; the message names it.
        """
        return self._batch(self._encode(samples))

    def bucket_by_length(self, samples: Sequence[Sample], waste: float = 0.25) -> list[Batch]:
        """The samples as batches of rows of similar length, each with at most about ``waste`` padding.

        Otherwise a short question would cost as much as the long text beside it.
        """
        parts: list[list[Row]] = []
        tokens = 0
        for row in sorted(self._encode(samples), key=lambda row: len(row[1])):
            length = len(row[1])
            if not parts or (tokens + length) < (1 - waste) * length * (len(parts[-1]) + 1):
                parts.append([])
                tokens = 0
            parts[-1].append(row)
            tokens += length
        return [self._batch(part) for part in parts]

    def packed(self, samples: Sequence[Sample], length: int) -> list[Batch]:
        """The samples one after another in rows of up to ``length`` tokens, each row a batch [1, T].

        There is no padding and no ``attention_mask``: ``position_ids`` [1, T] restart at 0 with every sample,
        from which transformers derives block-diagonal attention. A longer sample gets a row of its own.
        """
        rows: list[list[Row]] = []
        room: list[int] = []
        for row in sorted(self._encode(samples), key=lambda row: -len(row[1])):  # first fit, longest first
            fits = next((index for index, left in enumerate(room) if len(row[1]) <= left), len(rows))
            if fits == len(rows):
                rows.append([])
                room.append(length)
            rows[fits].append(row)
            room[fits] -= len(row[1])
        return [self._join(row) for row in rows]

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Prompts for generation as one batch, padded on the left, without labels."""
        return self._pad(self._prompts(samples), "left")

    def prompt_batches(
        self,
        samples: Sequence[Sample],
        batch_size: int,
        skip: Callable[[int, UserError], object] | None = None,
    ) -> Iterator[tuple[list[int], Batch]]:
        """The :meth:`prompts` of all samples, sorted by length within windows of 16 batches.

        Args:
            samples: conversations that wait for an answer.
            batch_size: rows of a batch.
            skip: called with the index and the error of a sample that cannot be encoded, which is then left
                out; without it the error is raised.

        Yields:
            The samples' indices, and their batch.
        """
        for start in range(0, len(samples), 16 * batch_size):
            rows: dict[int, EncodedConversation] = {}
            for index in range(start, min(start + 16 * batch_size, len(samples))):
                try:
                    (rows[index],) = self._prompts([samples[index]])
                except UserError as error:
                    if skip is None:
                        raise
                    skip(index, error)
            order = sorted(rows, key=lambda index: len(rows[index]["input_ids"]))
            for first in range(0, len(order), batch_size):
                chosen = order[first : first + batch_size]
                yield chosen, self._pad([rows[index] for index in chosen], "left")

    def _prompts(self, samples: Sequence[Sample]) -> list[EncodedConversation]:
        return [self._encode_one(sample, True) for sample in samples]

    def _encode_one(self, sample: Sample, prompt: bool) -> EncodedConversation:
        """A sample's inputs, with cached features in place of media if there is a cache."""
        if self.features is not None:
            return self.features.encode(sample, prompt)
        return self.processor.encode(sample.messages, prompt, sample.source)

    def _encode(self, samples: Sequence[Sample]) -> list[Row]:
        """Inputs and labels of each sample."""
        rows: list[Row] = []
        for sample in samples:
            one = self._encode_one(sample, False)
            mask = one["assistant_mask"]
            if not self._fit(one, mask, sample):
                continue
            if not any(mask):
                raise UserError(f"{sample.source}: there is no assistant text to learn from")
            pairs = zip(one["input_ids"], mask, strict=True)
            rows.append((one, [token if learned else IGNORED for token, learned in pairs]))
        if samples and not rows:  # all were dropped: a step without labels
            end = [self.processor.tokenizer.eos_token_id]
            empty = EncodedConversation(input_ids=end, assistant_mask=[0], position_ids=None, media={})
            rows.append((empty, [IGNORED]))
        return rows

    def _batch(self, rows: list[Row]) -> Batch:
        batch = self._pad([encoded for encoded, _ in rows], "right")
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
        return batch

    def _join(self, rows: list[Row]) -> Batch:
        """Concatenate several rows into one, with the media of all."""
        joined = EncodedConversation(input_ids=[], assistant_mask=[], position_ids=None, media={})
        for encoded, _ in rows:
            joined["input_ids"] += encoded["input_ids"]
            joined["assistant_mask"] += encoded["assistant_mask"]
            if encoded["position_ids"] is not None:
                joined["position_ids"] = (joined["position_ids"] or []) + encoded["position_ids"]
            for name, items in encoded["media"].items():
                if not is_of_tokens(name):
                    joined["media"].setdefault(name, []).extend(items)
        for name in {name for encoded, _ in rows for name in encoded["media"] if is_of_tokens(name)}:
            ids = [
                encoded["media"][name][0][:, : len(labels)]
                if name in encoded["media"]
                else torch.zeros(1, len(labels), dtype=torch.long)
                for encoded, labels in rows
            ]
            joined["media"][name] = [torch.cat(ids, 1)]
        batch = self._pad([joined], "right")
        del batch["attention_mask"]
        if "position_ids" not in batch:
            batch["position_ids"] = torch.cat([torch.arange(len(labels)) for _, labels in rows])[None]
        # mask the first label of each packed sample
        batch["labels"] = torch.tensor([sum(([IGNORED, *labels[1:]] for _, labels in rows), [])])
        return batch

    def _pad(self, rows: Sequence[EncodedConversation], side: str) -> Batch:
        padder = self.processor if self.features is None else self.features
        return cast(Batch, dict(padder.pad(rows, side)))

    def _fit(self, row: EncodedConversation, mask: list[int], sample: Sample) -> bool:
        """Apply ``overflow`` to the sample, in place; False drops it."""
        input_ids = row["input_ids"]
        if self.max_length is None or len(input_ids) <= self.max_length:
            return True
        length = len(input_ids)
        found = f"{sample.source}: the sample has {length} tokens, more than max_length {self.max_length}"
        if self.overflow == "error":
            raise UserError(f"{found}; raise max_length, or set overflow to truncate or drop")
        if self.overflow == "drop":
            if sample.source not in self._dropped:
                self._dropped.add(sample.source)
                log.warning("%s; it is dropped (%d so far)", found, len(self._dropped))
            return False
        if self._media_ids.intersection(input_ids[self.max_length :]) or not any(mask[: self.max_length]):
            raise UserError(f"{found}, and truncating it would remove media or all assistant text")
        for tokens in (input_ids, mask, row["position_ids"] or []):
            del tokens[self.max_length :]
        return True


def count_tokens(batch: Batch) -> int:
    """Number of tokens in a batch that are not padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
