"""Outputs of the frozen towers of a model of transformers, computed once and kept on disk.

    fill:   sample -> the model's processor -> pixel_values -> get_image_features -> a shard {"key.n": tensor}
    train:  sample -> the model's processor -> pixel_values -> key -> mm_encoder_outputs in their place

transformers' models take outputs of their towers as ``mm_encoder_outputs``. That nothing else of an image or
a video reaches the decoder is not assumed: some samples go through the model both ways. Where a connector
trains, the tower's features are kept as they enter it.

Shapes: N media tokens, D their width; M images, S positions of each, H hidden.
"""

import inspect
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from unimoe.errors import UserError, first_line
from unimoe.files import fingerprint
from unimoe.model.host import decoder_call, find_decoder, is_stock, towers
from unimoe.model.host_processor import HostProcessor
from unimoe.model.inputs import EncodedConversation, EncoderInputs
from unimoe.model.utils import to_device

from .feature_cache import FeatureCache, FeatureStore
from .sample import Sample

logger = logging.getLogger(__name__)

MODALITIES = ("image", "video")
"""Modalities of which ``mm_encoder_outputs`` holds outputs; audio is encoded each time."""

OF_NO_TOWER = (
    *("text_config", "quantization_config", "architectures", "dtype", "transformers_version"),
    "_name_or_path",
)
"""Entries of a model's configuration on which features do not depend."""


@dataclass
class TowerOutput(ModelOutput):
    """What a model reads of its tower's output."""

    pooler_output: Any = None
    deepstack_features: Any = None


class HostFeatures(FeatureStore):
    """Features of all images and videos that a model's frozen towers have seen.

    An entry holds all images of a sample, or all its videos: an image that comes back beside other ones is
    encoded and stored again. Its key is the hash of what the processor made of them, of the weights and the
    configuration of all that lies in front of the decoder, and of the storage dtype. So no entry is ever
    stale, and one folder serves all data sets and models. Media are still decoded: the processor places
    tokens by their sizes.
    """

    def __init__(
        self,
        folder: str | Path,
        model: PreTrainedModel,
        processor: HostProcessor,
        dtype: torch.dtype = torch.float32,
        flag: str = "data.cache_features",
    ) -> None:
        """Until :meth:`close`, ``model`` takes the batches that :meth:`pad` makes, as well as those with
        pixels, and so do copies of it.

        Args:
            folder: of the shards.
            model: of transformers.
            processor: of the model.
            dtype: what features are stored in.
            flag: the setting that errors tell to leave out.

        Raises:
            UserError: the model takes no outputs of towers, or more than one connector of it trains.
        """
        super().__init__(folder, dtype)
        self.model, self.processor, self.flag = model, processor, flag
        self.refused = f"{flag}: {type(model).__name__}"
        if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
            raise UserError(f"{self.refused} takes no outputs of towers (mm_encoder_outputs); leave it out")
        self.arguments = {
            modality: list(inspect.signature(method).parameters)
            for modality in MODALITIES
            if (method := self._method(modality)) is not None
        }
        """Arguments of ``get_image_features`` and ``get_video_features``; the first are the pixels."""
        self.connector = self._connector()
        """Name of the part that trains, whose inputs are kept; None where nothing trains."""
        self._lists: dict[str, bool] = {}
        """Whether the features of a modality are a list of tensors, as the model takes them."""
        self._context = self._fingerprint(dtype)
        self._hook: Any = model.register_forward_pre_hook(self._give, with_kwargs=True)

    def close(self) -> None:
        """The model takes no more batches of :meth:`pad`."""
        self._hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        """State without the model: loader workers only read, and a copy of the model copies its hooks."""
        return {**super().__getstate__(), "model": None, "_hook": None}

    # ---------------------------------------------------------------- which model

    def _method(self, modality: str) -> Any:
        return getattr(self.model.base_model, f"get_{modality}_features", None)

    def _front(self) -> dict[str, Tensor]:
        """All weights and buffers outside the decoder and the head, by name."""
        head = self.model.get_output_embeddings()
        parts = [find_decoder(self.model), *([] if head is None else [head])]
        inside = {id(tensor) for part in parts for tensor in chain(part.parameters(), part.buffers())}
        named = chain(self.model.named_parameters(), self.model.named_buffers())
        return {name: tensor for name, tensor in named if id(tensor) not in inside}

    def _connector(self) -> str | None:
        """Name of what trains in front of the decoder; everything else is put in evaluation mode."""
        front = self._front()
        divided = [name for name, tensor in front.items() if isinstance(tensor, DTensor)]
        if divided:
            raise UserError(f"{self.refused}: fsdp2 divides {divided[0]} over processes; use strategy ddp")
        trained = [name for name, tensor in front.items() if tensor.requires_grad]
        parts = towers(self.model)
        own = {name: part for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}
        weights = sum(p.requires_grad for part in own.values() for p in part.parameters())
        if len(own) > 1 or weights < len(trained) or (own and len(parts) == 1):
            raise UserError(
                f"{self.refused}: {trained[0]} trains, whose outputs change with every step; leave it out"
            )
        for name, part in parts.items():
            if name not in own:
                part.eval()
        trains = next(iter(own.values()), None)
        return next((name for name, part in self.model.named_modules() if part is trains), None)

    def _part_that_trains(self, model: nn.Module) -> nn.Module | None:
        return None if self.connector is None else model.get_submodule(self.connector)

    def _fingerprint(self, dtype: torch.dtype) -> str:
        config = {key: value for key, value in self.model.config.to_dict().items() if key not in OF_NO_TOWER}
        connector = self._part_that_trains(self.model)
        kept = set() if connector is None else set(map(id, connector.parameters()))
        kind = [type(self.model).__name__, config, str(dtype), connector is None]
        named = (
            (f"{name} {tensor.dtype} {tuple(tensor.shape)}", tensor)
            for name, tensor in sorted(self._front().items())
            if id(tensor) not in kept
        )
        return fingerprint(json.dumps(kind, sort_keys=True, default=str), *chain.from_iterable(named))

    # ---------------------------------------------------------------- writing

    def fill(self, samples: Iterable[Sample], rank: int = 0, ranks: int = 1, shard_size: int = 256) -> int:
        """Encode the images and videos of ``samples`` that are not stored yet, and see that the model answers
        the same with them.

        A shard is written after each ``shard_size`` entries; an interrupted call resumes after the last one.

        Args:
            samples: of all processes.
            rank: of this process, which encodes every ``ranks``-th sample.
            ranks: number of processes.
            shard_size: entries of a shard, or one more.

        Returns:
            How many entries were made.

        Raises:
            UserError: a sample cannot be encoded, or the model answers differently with cached features.
        """
        with_media = [sample for sample in samples if any(True for _ in sample.media())]
        self._check(with_media)
        entries: dict[str, list[Tensor]] = {}
        seen: set[tuple[Any, ...]] = set()
        encoded, started = 0, time.monotonic()
        for sample in islice(with_media, rank, None, ranks):
            paths = tuple((part["type"], str(part.get("path"))) for part in sample.media())
            if paths in seen:
                continue
            if all("path" in part for part in sample.media()):
                seen.add(paths)
            media = self._prompt(sample)["media"]
            for modality in self._present(media):
                key = self.key(modality, media)
                if key not in self and key not in entries:
                    entries[key] = self._run(modality, media)
            if len(entries) >= shard_size:
                encoded += self._write(entries, encoded, started)
        return encoded + self._write(entries, encoded, started)

    def _write(self, entries: dict[str, list[Tensor]], before: int, started: float) -> int:
        count = len(entries)
        if entries:
            self.add(entries)
            entries.clear()
            seconds = time.monotonic() - started
            logger.info("encoded %d entries of images or videos in %.0f s", before + count, seconds)
        return count

    def _prompt(self, sample: Sample) -> EncodedConversation:
        return self.processor.encode(sample.messages, True, sample.source)

    @torch.no_grad()
    def _run(self, modality: str, media: EncoderInputs) -> list[Tensor]:
        """Features of a sample, on the CPU: one tensor, and one of each deepstack layer."""
        device = self.model.device
        given = {name: media[name][0].to(device) for name in self.arguments[modality] if name in media}
        seen: list[Tensor] = []
        connector, hook = self._part_that_trains(self.model), None
        if connector is not None:
            hook = connector.register_forward_pre_hook(lambda _, args: seen.extend(args[:1]))
        try:
            output = self._method(modality)(**given, return_dict=True)
        finally:
            if hook is not None:
                hook.remove()
        pooled, deep = output.pooler_output, getattr(output, "deepstack_features", None) or []
        self._lists[modality] = not isinstance(pooled, Tensor)
        kept = seen if connector is not None else [_whole(one) for one in (pooled, *deep)]
        return [one.cpu() for one in kept]

    def _check(self, samples: Sequence[Sample]) -> None:
        """Two samples of the same modalities must reach the decoder as without the cache."""
        groups: dict[frozenset[str], list[Sample]] = {}
        for sample in samples:
            same = groups.setdefault(frozenset(part["type"] for part in sample.media()), [])
            if len(same) < 2:
                same.append(sample)
        for same in groups.values():
            self._compare([self._prompt(sample) for sample in same])

    @torch.no_grad()
    def _compare(self, rows: Sequence[EncodedConversation]) -> None:
        kept = []
        for row in rows:
            features = {one: self._run(one, row["media"]) for one in self._present(row["media"])}
            kept.append(self._replace(row, features))
        device = self.model.device
        pixels = to_device(dict(self.processor.pad(rows)), device)
        batch = to_device(self.pad(kept), device)
        embed: Any = self.model.get_input_embeddings()
        width = self.model.config.get_text_config().hidden_size
        zeros = torch.zeros(width, dtype=self.model.dtype, device=device)
        embed.forward = lambda ids: zeros.repeat(*ids.shape, 1)  # fsdp2 may divide the embeddings
        try:
            plain = decoder_call(self.model, pixels)
            try:
                cached = decoder_call(self.model, batch)
            except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
                reason = first_line(error)
                raise UserError(f"{self.refused} does not take cached features: {reason}") from error
        finally:
            del embed.forward
        if any(call.get("inputs_embeds") is None for call in (plain, cached)):
            found = "gives its decoder no inputs_embeds by name, which could be compared"
            raise UserError(f"{self.refused} {found}; leave it out")
        for name in plain.keys() | cached.keys():
            found = [
                [x for x in tree_leaves(call.get(name)) if isinstance(x, Tensor)] for call in (plain, cached)
            ]
            if not _same(*found):
                raise UserError(
                    f"{self.refused}: with cached features its decoder receives other {name}; leave it out"
                )

    # ---------------------------------------------------------------- reading

    def _present(self, media: Mapping[str, Any]) -> list[str]:
        return [modality for modality, names in self.arguments.items() if names[0] in media]

    def key(self, modality: str, media: EncoderInputs) -> str:
        """The key of a sample's images or videos, as the processor gives them."""
        named = {name: media[name][0] for name in self.arguments[modality] if name in media}
        content = ((f"{name} {one.dtype} {tuple(one.shape)}", one) for name, one in named.items())
        return fingerprint(self._context, modality, *chain.from_iterable(content))

    def encode(self, sample: Sample, prompt: bool) -> EncodedConversation:
        """A sample's inputs, with features in place of pixels.

        Args:
            sample: whose images and videos are stored.
            prompt: end with the opening of an assistant turn.

        Raises:
            UserError: features are not in the cache, or the sample cannot be encoded.
        """
        row = self.processor.encode(sample.messages, prompt, sample.source)
        features: dict[str, list[Tensor]] = {}
        for modality in self._present(row["media"]):
            found = self.get(self.key(modality, row["media"]))
            if found is None:
                missing = f"its {modality} is not in the feature cache {self.folder}"
                raise UserError(f"{sample.source}: {missing}; fill it first, or leave {self.flag} out")
            features[modality] = found
        return self._replace(row, features)

    def _replace(self, row: EncodedConversation, features: dict[str, list[Tensor]]) -> EncodedConversation:
        media = dict(row["media"])
        for modality, tensors in features.items():
            del media[self.arguments[modality][0]]
            media |= {f"cached {modality} {index}": [tensor] for index, tensor in enumerate(tensors)}
        return {**row, "media": media}

    def pad(self, rows: Sequence[EncodedConversation], side: str = "right") -> dict[str, Any]:
        """Conversations from :meth:`encode` as one batch, with features under ``mm_encoder_outputs``."""
        batch = dict(self.processor.pad(rows, side))
        given = {}
        for modality in self.arguments:
            names = [name for name in batch if name.startswith(f"cached {modality} ")]
            if names:
                given[modality] = tuple(batch.pop(name) for name in names)
        if given:
            batch["mm_encoder_outputs"] = given
        return batch

    def _give(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Convert the tensors of :meth:`pad` to what the model takes, before it runs."""
        given = dict(kwargs.get("mm_encoder_outputs") or {})
        for modality, tensors in given.items():
            if isinstance(tensors, tuple):
                given[modality] = self._output(model, modality, tensors)
        return args, {**kwargs, **({"mm_encoder_outputs": given} if given else {})}

    def _output(self, model: Any, modality: str, tensors: tuple[Tensor, ...]) -> TowerOutput:
        pooled, *deep = (tensor.to(model.dtype) for tensor in tensors)
        connector = self._part_that_trains(model)
        if connector is not None:
            pooled = connector(pooled.to(next(connector.parameters()).dtype))
        return TowerOutput(
            pooler_output=[pooled.flatten(0, -2)] if self._lists[modality] else pooled,
            deepstack_features=[[layer] for layer in deep] or None,
        )


def open_feature_cache(
    model: Any, processor: Any, folder: str | Path, flag: str
) -> FeatureCache | HostFeatures:
    """The cache that suits a model: of its towers if it is one of transformers' own, else of its frozen
    encoders.

    Args:
        model: of transformers, or of this package.
        processor: of the model.
        folder: of the features.
        flag: the setting that errors name.

    Raises:
        UserError: the features of the model cannot be cached.
    """
    if is_stock(model):
        return HostFeatures(folder, model, processor, flag=flag)
    frozen = {
        modality: encoder
        for modality, encoder in model.model.encoders.items()
        if not any(p.requires_grad for p in encoder.parameters())
    }
    return FeatureCache(folder, processor, frozen)


def _whole(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))


def _same(plain: list[Tensor], cached: list[Tensor]) -> bool:
    """Whether tensors are equal but for rounding in another batch."""
    return len(plain) == len(cached) and all(map(_close, plain, cached))


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    other = other.to(one.dtype)
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = one[one.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    tolerance = torch.finfo(one.dtype).eps ** 0.5 * largest
    return torch.allclose(other, one, rtol=0, atol=tolerance, equal_nan=True)
