"""Outputs of frozen encoders, computed once and kept on disk.

    each distinct image or clip -> decoded -> preprocessor -> encoder -> a shard of {"key.window":
    features_SD}

``FeatureStore`` is the storage (the detector keeps its backbone's maps in one too); ``FeatureCache`` fills
one with the features of a data set's media.

Shapes: M encoder items (images, speech windows), S encoder positions, D encoder width.
"""

import copy
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unimoe.encoders import Encoder, num_tokens
from unimoe.errors import UserError
from unimoe.files import atomic_write, fingerprint
from unimoe.media.source import Part, describe, media_bytes
from unimoe.model.inputs import EncodedConversation, Prepared
from unimoe.model.processing import UniMoeProcessor
from unimoe.model.rope_3d import Span, image_span

from .sample import Sample

logger = logging.getLogger(__name__)

AUDIO_POSITIONS = 50
"""Encoder positions per second of audio, of Whisper and of BEATs."""


class FeatureStore:
    """Key -> list of tensors, in a folder of safetensors shards that several processes may read and
    extend."""

    def __init__(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """``dtype`` is what tensors are stored in; they are read back as float32."""
        self.folder, self.dtype = Path(folder), dtype
        self._open: dict[Path, Any] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        """Key -> its shard and the number of its tensors."""
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # for loader workers: open files cannot be pickled

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> list[Tensor]:
        """The tensors under ``key``."""
        shard, count = self._places[key]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, "pt")
        return [self._open[shard].get_tensor(f"{key}.{number}").float() for number in range(count)]

    def get(self, key: str) -> list[Tensor] | None:
        """The tensors under ``key``, None if there are none."""
        return self.read(key) if key in self else None

    def refresh(self) -> None:
        """Register the shards that other processes wrote.

        Raises:
            UserError: a shard is not a complete safetensors file.
        """
        known = {shard for shard, _ in self._places.values()}
        for shard in sorted(set(self.folder.glob("*.safetensors")) - known):
            self._register(shard)

    def add(self, entries: Mapping[str, list[Tensor]]) -> None:
        """Write key -> tensors as one shard, which appears complete or not at all.

        Raises:
            UserError: the disk is full, or the folder is not writable.
        """
        tensors = {
            f"{key}.{number}": tensor.to("cpu", self.dtype).contiguous().clone()
            for key, row in entries.items()
            for number, tensor in enumerate(row)
        }
        shard = self.folder / f"{fingerprint(*sorted(tensors))[:16]}.safetensors"
        atomic_write(shard, save(tensors))
        self._register(shard)

    def _register(self, shard: Path) -> None:
        try:
            with safe_open(shard, "pt") as file:
                names = list(file.keys())
        except SafetensorError as error:
            raise UserError(f"{shard} is not a complete safetensors file: {error}; delete it") from error
        counts = Counter(name.partition(".")[0] for name in names)
        self._places.update({key: (shard, count) for key, count in counts.items()})


class FeatureCache(FeatureStore):
    """Features of all media that frozen encoders have seen: key -> features [S, D] of each encoder item (an
    image has one, long speech several).

    A key is the hash of the file's bytes, its preprocessing, the encoder's configuration and weights, and the
    storage dtype. So no entry is ever stale, and one folder serves all data sets and encoders.
    """

    def __init__(
        self,
        folder: str | Path,
        processor: UniMoeProcessor,
        encoders: Mapping[str, Encoder],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``encoders`` are those to cache, by modality; they are put in evaluation mode.

        Raises:
            UserError: features of videos would be cached, but the model's positions need their times.
        """
        super().__init__(folder, dtype)
        if processor.rope_rate and "video" in encoders:
            needed = "which this model's positions (rope_sections) need"
            raise UserError(f"cached features of videos have no times, {needed}; leave cache_features out")
        self.processor, self.encoders = processor, encoders
        self._context = {
            modality: encoder_fingerprint(
                encoder.eval(), processor.modalities[modality]["preprocessing"], dtype
            )
            for modality, encoder in encoders.items()
        }
        self._keys: dict[tuple[Any, ...], str] = {}
        """Modality, path, size and time of change of a file -> its key."""
        self._stored: dict[str, _CachedFeatures] = {}
        for modality in sorted(encoders):
            has_lengths = len(processor.preprocessors[modality].outputs) > 1
            connector = processor.modalities[modality]["connector"]
            self._stored[modality] = _CachedFeatures(modality, connector, has_lengths)
        self._reader = copy.copy(processor)
        self._reader.preprocessors = {**processor.preprocessors, **self._stored}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "encoders": {}}  # loader workers only read

    @property
    def modalities(self) -> frozenset[str]:
        """The modalities that are cached."""
        return frozenset(self._context)

    def key(self, part: Part, where: str) -> str:
        """The key of an image, video or clip. A file is hashed again only if its size or time of change
        differ.

        Raises:
            UserError: the file cannot be read.
        """
        stamp = _stamp(part)
        key = self._keys.get(stamp) if stamp else None
        if key is None:
            key = fingerprint(self._context[part["type"]], media_bytes(part, where))
            if stamp:
                self._keys[stamp] = key
        return key

    def fill(
        self,
        samples: Iterable[Sample],
        rank: int = 0,
        ranks: int = 1,
        batch_size: int = 16,
        shard_size: int = 256,
    ) -> int:
        """Encode all distinct media of ``samples`` that are not stored yet.

        A shard is written after each ``shard_size`` media; an interrupted call resumes after the last one.

        Args:
            samples: of all processes.
            rank: of this process, which encodes every ``ranks``-th sample.
            ranks: number of processes.
            batch_size: media of a batch.
            shard_size: media of a shard.

        Returns:
            How many were encoded.

        Raises:
            UserError: a file cannot be read or decoded; the message names the sample.
        """
        waiting: dict[str, tuple[Part, str]] = {}
        seen: set[tuple[str, str]] = set()
        for sample in islice(samples, rank, None, ranks):
            for part in sample.media():
                place = (part["type"], str(part.get("path")))
                if part["type"] not in self.modalities or place in seen:
                    continue
                if "path" in part:
                    seen.add(place)
                key = self.key(part, sample.source)
                if key not in self:
                    waiting.setdefault(key, (part, sample.source))
        todo = sorted(waiting, key=lambda key: waiting[key][0]["type"])
        started = time.monotonic()
        for start in range(0, len(todo), shard_size):
            entries: dict[str, list[Tensor]] = {}
            shard = todo[start : start + shard_size]
            for modality in self.modalities:
                keys = [key for key in shard if waiting[key][0]["type"] == modality]
                for first in range(0, len(keys), batch_size):
                    batch = {key: waiting[key] for key in keys[first : first + batch_size]}
                    entries.update(self._encode(modality, batch))
            self.add(entries)
            seconds = time.monotonic() - started
            logger.info("encoded %d of %d media in %.0f s", start + len(shard), len(todo), seconds)
        return len(todo)

    @torch.no_grad()
    def _encode(self, modality: str, media: Mapping[str, tuple[Part, str]]) -> dict[str, list[Tensor]]:
        preprocessor, encoder = self.processor.preprocessors[modality], self.encoders[modality]
        rows, owners = [], []
        for key, (part, where) in media.items():
            inputs = preprocessor(part, where).inputs
            rows.append(
                EncodedConversation(input_ids=[0], assistant_mask=[0], position_ids=None, media=inputs)
            )
            owners += [key] * len(inputs[preprocessor.outputs[-1]])
        batch = self.processor.pad(rows)
        device = next(encoder.parameters()).device
        features_MSD, lengths_M = encoder(*(batch[name].to(device) for name in preprocessor.outputs))
        entries: dict[str, list[Tensor]] = {key: [] for key in media}
        for item, key in enumerate(owners):
            length = features_MSD.shape[1] if lengths_M is None else int(lengths_M[item])
            entries[key].append(features_MSD[item, :length])
        return entries

    def encode(self, sample: Sample, prompt: bool) -> EncodedConversation:
        """A sample's inputs, with features in place of media.

        Args:
            sample: whose media are stored.
            prompt: end with the opening of an assistant turn.

        Raises:
            UserError: features are not in the cache, or the sample cannot be encoded.
        """

        def stored(part: Part) -> Part:
            modality = part["type"]
            if modality not in self.modalities:
                return part
            windows = self.get(self.key(part, sample.source))
            if windows is None:
                missing = f"{describe(part)} is not in the feature cache {self.folder}"
                raise UserError(f"{sample.source}: {missing}; fill it first")
            return {"type": modality, modality: windows}

        messages = [
            {**turn, "content": [stored(part) for part in turn["content"]]} for turn in sample.messages
        ]
        return self._reader.encode(messages, prompt, sample.source)

    def pad(self, rows: Sequence[EncodedConversation], side: str = "right") -> dict[str, Any]:
        """Conversations from :meth:`encode` as one batch, with features under ``encoded_media``."""
        batch = dict(self._reader.pad(rows, side))
        present = [modality for modality, stored in self._stored.items() if stored.outputs[0] in batch]
        if present:
            batch["encoded_media"] = {modality: self._stored[modality].take(batch) for modality in present}
        return batch


def _stamp(part: Part) -> tuple[Any, ...] | None:
    """Changes with the file behind a part; None for anything but a single file."""
    if not isinstance(part.get("path"), str):
        return None
    try:
        found = os.stat(part["path"])
    except OSError:
        return None  # reading it reports the error
    return part["type"], part["path"], found.st_size, found.st_mtime_ns


def encoder_fingerprint(encoder: Encoder, preprocessing: Mapping[str, Any], dtype: torch.dtype) -> str:
    """Hash of an encoder's configuration and weights, its preprocessing, and the storage dtype."""
    description = json.dumps([encoder.config, preprocessing, str(dtype)], sort_keys=True, default=str)
    weights = sorted(encoder.state_dict().items())
    named = ((f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor) for name, tensor in weights)
    return fingerprint(description, *chain.from_iterable(named))


class _CachedFeatures:
    """Stands in for a preprocessor: a part holds the cached features [S, D] of each encoder item."""

    def __init__(self, modality: str, connector: dict[str, Any], has_lengths: bool) -> None:
        self.modality = modality
        self.outputs = (f"{modality}_encoded", f"{modality}_lengths")
        self.connector = connector
        self.has_lengths = has_lengths

    def load(self, part: Part, where: str) -> Part:
        return part

    def __call__(self, part: Part, where: str) -> Prepared:
        windows: list[Tensor] = part[self.modality]
        values = windows, [torch.tensor(len(window)) for window in windows]
        tokens = sum(num_tokens(self.connector, len(window)) for window in windows)
        if self.modality == "image":
            span = image_span(tokens)
        else:
            span = Span("audio", tokens, seconds=(sum(map(len, windows)) / AUDIO_POSITIONS,))
        return Prepared(dict(zip(self.outputs, values, strict=True)), tokens, span)

    def take(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Remove this modality's features from ``batch`` and return them as the encoder would have."""
        features_MSD, lengths_M = (batch.pop(name) for name in self.outputs)
        return features_MSD, lengths_M if self.has_lengths else None
