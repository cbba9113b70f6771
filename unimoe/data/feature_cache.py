"""Outputs of frozen encoders, computed once and kept on disk.

    each distinct medium -> decoded -> preprocessor -> encoder -> a shard of {"key.window": features_SD}

Shapes: M encoder items (pictures, speech windows), S encoder positions, D encoder width.
"""

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unimoe.encoders import Encoder
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.media.decode import media_bytes
from unimoe.media.part import Part

from .sample import Sample

logger = logging.getLogger(__name__)


class FeatureCache:
    """Stored features of all media that frozen encoders have seen, in a folder of safetensors shards.

    The key of a medium is the hash of its bytes, its preprocessing, its encoder's configuration and weights,
    and the storage dtype. So no entry is ever stale, and one folder serves all data sets and encoders.
    """

    def __init__(
        self,
        folder: str | Path,
        processor: Any,
        encoders: Mapping[str, Encoder],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``encoders`` are those to cache, by part type ("image", "speech"); they are put in evaluation mode.
        ``dtype`` is what features are stored in; they are read back as float32."""
        self.folder, self.processor, self.encoders, self.dtype = Path(folder), processor, encoders, dtype
        self._context = {
            modality: fingerprint(encoder.eval(), processor.modalities[modality]["preprocessing"], dtype)
            for modality, encoder in encoders.items()
        }
        self._open: dict[Path, Any] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        """Key -> its shard and the number of its windows."""
        self._keys: dict[tuple[Any, ...], str] = {}
        """Kind, path, size and time of change of a file -> its key."""
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "encoders": {}}  # for loader workers: they only read

    @property
    def modalities(self) -> frozenset[str]:
        """The part types that are cached."""
        return frozenset(self._context)

    def key(self, part: Part, where: str) -> str:
        """The key of a medium. Raises UserError when the file cannot be read.

        A file is read again only when its size or its time of change differ from those it was read with.
        """
        stamp = _stamp(part)
        key = self._keys.get(stamp) if stamp else None
        if key is None:
            content = media_bytes(part, where)
            key = hashlib.sha256(self._context[part["type"]].encode() + content).hexdigest()
            if stamp:
                self._keys[stamp] = key
        return key

    def get(self, key: str) -> list[Tensor] | None:
        """The features [S, D] of each encoder item of a medium: a picture has one, long speech several."""
        if key not in self._places:
            return None
        shard, windows = self._places[key]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, "pt")
        return [self._open[shard].get_tensor(f"{key}.{number}").float() for number in range(windows)]

    def refresh(self) -> None:
        """Take in the shards that other processes wrote."""
        known = {shard for shard, _ in self._places.values()}
        for shard in sorted(set(self.folder.glob("*.safetensors")) - known):
            self._register(shard)

    def add(self, entries: Mapping[str, list[Tensor]]) -> None:
        """Write key -> features [S, D] of each item as one shard, which appears whole or not at all."""
        tensors = {
            f"{key}.{number}": window.to("cpu", self.dtype).contiguous().clone()
            for key, windows in entries.items()
            for number, window in enumerate(windows)
        }
        name = hashlib.sha256("".join(sorted(tensors)).encode()).hexdigest()[:16]
        shard = self.folder / f"{name}.safetensors"
        atomic_write(shard, save(tensors))
        self._register(shard)

    def fill(self, samples: Iterable[Sample], batch_size: int = 16, shard_size: int = 256) -> int:
        """Encode every distinct medium of ``samples`` that is not stored yet; returns how many that were.

        A shard is written after each ``shard_size`` media; a call that was cut off goes on from the last.
        Raises UserError, naming the sample, for a medium that cannot be decoded.
        """
        waiting: dict[str, tuple[Part, str]] = {}
        seen: set[tuple[str, str]] = set()
        for sample in samples:
            for part in sample.media():
                place = (part["type"], str(part.get("path")))
                if part["type"] not in self.modalities or place in seen:
                    continue
                if "path" in part:
                    seen.add(place)
                key = self.key(part, sample.source)
                if key not in self._places:
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
            inputs, _ = preprocessor(preprocessor.load(part, where))
            rows.append({"input_ids": [0], **inputs})
            owners += [key] * len(inputs[preprocessor.outputs[-1]])
        batch = self.processor.pad(rows)
        device = next(encoder.parameters()).device
        features_MSD, lengths_M = encoder(*(batch[name].to(device) for name in preprocessor.outputs))
        entries: dict[str, list[Tensor]] = {key: [] for key in media}
        for item, key in enumerate(owners):
            length = features_MSD.shape[1] if lengths_M is None else int(lengths_M[item])
            entries[key].append(features_MSD[item, :length])
        return entries

    def _register(self, shard: Path) -> None:
        try:
            with safe_open(shard, "pt") as file:
                names = list(file.keys())
        except SafetensorError as error:
            raise UserError(f"{shard} is not a whole safetensors file: {error}; delete it") from error
        windows = Counter(name.partition(".")[0] for name in names)
        self._places.update({key: (shard, count) for key, count in windows.items()})


def _stamp(part: Part) -> tuple[Any, ...] | None:
    """What changes when the file behind a part does; None for what is no single file."""
    if not isinstance(part.get("path"), str):
        return None
    try:
        found = os.stat(part["path"])
    except OSError:
        return None  # reading it says what is wrong
    return part["type"], part["path"], found.st_size, found.st_mtime_ns


def fingerprint(encoder: Encoder, preprocessing: Mapping[str, Any], dtype: torch.dtype) -> str:
    """Hash of an encoder's configuration and weights, its preprocessing, and the storage dtype."""
    description = [encoder.config, preprocessing, str(dtype)]
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
