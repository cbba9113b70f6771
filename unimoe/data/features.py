"""Outputs of frozen encoders, computed once and kept on disk.

    fill:     each distinct medium -> decoded -> preprocessor -> encoder -> shard of {key.window: features_SD}
    training: medium -> key -> windows read back -> processor counts tokens -> batch["encoded_media"]

Shapes: M encoder items (pictures, speech windows), S encoder positions, D encoder width.
"""

import copy
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from unimoe.encoders import num_tokens
from unimoe.errors import UserError
from unimoe.files import atomic_write

from .media import LOADERS, describe, media_bytes
from .sample import Message, Part, Sample

logger = logging.getLogger(__name__)


class FeatureCache:
    """Stored features of every medium that frozen encoders have seen, in a folder of safetensors shards.

    A medium's key is the hash of its bytes, its preprocessing, and its encoder's configuration and weights, so
    entries can never be stale and one folder serves any number of data sets and encoders.
    """

    def __init__(
        self,
        folder: str | Path,
        processor: Any,
        encoders: Mapping[str, nn.Module],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``encoders`` are by part type ("image", "speech") and only they are cached; other media are encoded as
        usual. ``dtype`` is what new entries are stored in; features are read back as float32."""
        self.folder = Path(folder)
        self.dtype = dtype
        self._kinds = {
            kind: fingerprint(encoder, processor.modalities[kind]["preprocessing"]) for kind, encoder in encoders.items()
        }
        self._no_lengths = {kind for kind in encoders if len(processor.preprocessors[kind].outputs) == 1}
        self._shards: dict[str, Any] = {}
        self._where: dict[str, list[Path]] = {}
        """Key -> the shard of each of its windows."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._register(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}  # open files do not travel to workers

    def key(self, part: Part, where: str) -> str:
        """The key of a medium. Raises UserError when the file cannot be read."""
        content = media_bytes(part, where)
        return hashlib.sha256(self._kinds[part["type"]].encode() + content).hexdigest()

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def get(self, key: str) -> list[Tensor]:
        """The features [S, D] of each encoder item of a medium (a picture has one, long speech several), float32."""
        windows = []
        for number, shard in enumerate(self._where[key]):
            if shard.name not in self._shards:
                self._shards[shard.name] = safe_open(shard, "pt")
            windows.append(self._shards[shard.name].get_tensor(f"{key}.{number}").float())
        return windows

    def add(self, entries: Mapping[str, list[Tensor]]) -> None:
        """Write entries, key -> features [S, D] of each item, as one shard that appears whole or not at all."""
        tensors = {
            f"{key}.{number}": window.to("cpu", self.dtype).contiguous().clone()
            for key, windows in entries.items()
            for number, window in enumerate(windows)
        }
        if tensors:
            shard = self.folder / f"{hashlib.sha256(''.join(sorted(tensors)).encode()).hexdigest()[:16]}.safetensors"
            atomic_write(shard, save(tensors))
            self._register(shard)

    @torch.no_grad()
    def fill(
        self,
        samples: Iterable[Sample],
        processor: Any,
        encoders: Mapping[str, nn.Module],
        batch_size: int = 16,
        shard_size: int = 256,
    ) -> int:
        """Run the encoders over every distinct medium that is not stored yet; returns how many that were.

        A shard is written after each ``shard_size`` media, and a call that was cut off goes on from there. Raises
        UserError, naming the sample, for media that cannot be decoded.
        """
        waiting: dict[str, tuple[Part, str]] = {}
        seen: set[str] = set()
        for sample in samples:
            for part in sample.media():
                if part["type"] not in self._kinds or part.get("path") in seen:
                    continue
                if "path" in part:
                    seen.add(part["path"])
                key = self.key(part, sample.source)
                if key not in self:
                    waiting.setdefault(key, (part, sample.source))
        todo = sorted(waiting, key=lambda key: waiting[key][0]["type"])
        started = time.monotonic()
        for start in range(0, len(todo), shard_size):
            chunk = todo[start : start + shard_size]
            self.add(self._encode({key: waiting[key] for key in chunk}, processor, encoders, batch_size))
            logger.info("encoded %d of %d media in %.0f s", start + len(chunk), len(todo), time.monotonic() - started)
        return len(todo)

    def _encode(
        self,
        media: Mapping[str, tuple[Part, str]],
        processor: Any,
        encoders: Mapping[str, nn.Module],
        batch_size: int,
    ) -> dict[str, list[Tensor]]:
        entries: dict[str, list[Tensor]] = {key: [] for key in media}
        for kind, encoder in encoders.items():
            keys = [key for key, (part, _) in media.items() if part["type"] == kind]
            names = processor.preprocessors[kind].outputs
            for start in range(0, len(keys), batch_size):
                rows, owners = [], []
                for key in keys[start : start + batch_size]:
                    inputs, _ = processor.preprocessors[kind](LOADERS[kind](*media[key]))
                    rows.append({"input_ids": [0], **inputs})
                    owners += [key] * len(inputs[names[0]])
                batch = processor.pad(rows)
                features_MSD, lengths_M = encoder(*(batch[name] for name in names))
                for item, key in enumerate(owners):
                    length = features_MSD.shape[1] if lengths_M is None else int(lengths_M[item])
                    entries[key].append(features_MSD[item, :length])
        return entries

    def attach(self, processor: Any) -> Any:
        """A shallow copy of ``processor`` that takes stored features where it took decoded media of the cached kinds."""
        attached = copy.copy(processor)
        attached.preprocessors = dict(processor.preprocessors)
        for kind in self._kinds:
            attached.preprocessors[kind] = _StoredFeatures(kind, processor.modalities[kind]["connector"])
        return attached

    def substitute(self, sample: Sample) -> list[Message]:
        """The messages of ``sample`` with stored features as media of the cached kinds. UserError if one is lacking."""

        def stored(part: Part) -> Part:
            kind = part["type"]
            if kind not in self._kinds:
                return part
            key = self.key(part, sample.source)
            if key not in self:
                raise UserError(f"{sample.source}: {describe(part)} is not in the feature cache {self.folder}; fill it first")
            return {"type": kind, kind: self.get(key)}

        return [{**message, "content": [stored(part) for part in message["content"]]} for message in sample.messages]

    def gather(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Move the stored features of a padded batch to ``encoded_media``: kind -> (features [M, S, D], lengths [M] or None)."""
        encoded = {}
        for kind in self._kinds:
            features, lengths = (batch.pop(name, None) for name in _stored_names(kind))
            if features is not None:
                encoded[kind] = (features.transpose(1, 2), None if kind in self._no_lengths else lengths)
        return {**batch, "encoded_media": encoded} if encoded else batch

    def _register(self, shard: Path) -> None:
        try:
            with safe_open(shard, "pt") as file:
                names = sorted(file.keys())
        except SafetensorError as error:
            raise UserError(f"{shard} is not a whole safetensors file: {error}; delete it") from error
        windows: dict[str, int] = {}
        for name in names:
            windows[name.partition(".")[0]] = windows.get(name.partition(".")[0], 0) + 1
        self._where.update({key: [shard] * count for key, count in windows.items()})


class _StoredFeatures:
    """Stands in for a modality's preprocessor: its item is the list of stored features [S, D] of one medium."""

    def __init__(self, kind: str, connector: dict[str, Any]) -> None:
        self.outputs = _stored_names(kind)
        self.connector = connector

    def __call__(self, windows: list[Tensor]) -> tuple[dict[str, list[Tensor]], int]:
        # The processor pads the last axis, so positions go there.
        values = [window.T for window in windows], [torch.tensor(len(window)) for window in windows]
        tokens = sum(num_tokens(self.connector, len(window)) for window in windows)
        return dict(zip(self.outputs, values, strict=True)), tokens


def _stored_names(kind: str) -> tuple[str, str]:
    return f"{kind}_encoded", f"{kind}_lengths"


def fingerprint(encoder: nn.Module, preprocessing: Mapping[str, Any]) -> str:
    """Hash of an encoder's configuration and weights and of the preprocessing before it."""
    digest = hashlib.sha256(json.dumps([encoder.config, preprocessing], sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
