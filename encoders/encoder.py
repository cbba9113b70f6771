"""What every encoder is, and how one is built from a plain dictionary.

Shapes: B items, H x W pixels, M mel bins, F mel frames, S encoder positions, D encoder width.
"""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from unimoe.errors import UserError

from .weights import fill, read_tensors, select_prefix

# Imported on demand: timm, open_clip and whisper take a second each.
_ENCODERS = {
    "timm": ("timm_image", "TimmImageEncoder"),
    "open_clip": ("open_clip_image", "OpenClipImageEncoder"),
    "clip": ("transformers_image", "ClipImageEncoder"),
    "siglip": ("transformers_image", "SiglipImageEncoder"),
    "frames": ("video", "FramesEncoder"),
    "whisper": ("whisper_speech", "WhisperSpeechEncoder"),
    "beats": ("beats", "BeatsEncoder"),
}

C = TypeVar("C")


class Encoder(nn.Module):
    """A tower that turns media of one modality into features ``[B, S, D]``; the caller freezes or trains it.

    The constructor takes the class's ``Config`` and builds the structure only: no files, no network, and any
    default device, ``meta`` included. Weights come from ``load_encoder`` or from the whole model's
    ``from_pretrained``.
    """

    kind: ClassVar[str]
    """The ``type`` that names this class in a configuration."""
    modality: ClassVar[str]
    """``image``, ``video``, ``speech`` or ``audio``; encoders of speech take audio, and the reverse."""
    Config: ClassVar[type]
    """Dataclass of this encoder's settings."""
    prefixes: ClassVar[tuple[str, ...]] = ("",)
    """Prefixes under which this tower may lie inside a checkpoint."""

    config: dict[str, Any]
    """JSON-able; ``build_encoder(encoder.config)`` makes an equal structure."""
    hidden_size: int
    """D, the width of the features."""
    preprocessing: dict[str, Any]
    """What the processor needs to know, JSON-able; see ``unimoe.model.preprocessing``."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = {"type": self.kind, **asdict(config)}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; inputs are cast to it."""
        return next(self.parameters()).dtype

    @property
    def tower(self) -> nn.Module:
        """The module that a checkpoint's tensors are for."""
        raise TypeError(f"{type(self).__name__} must say which of its modules a checkpoint fills")

    @classmethod
    def complete(cls, config: dict[str, Any], weights: str | None) -> dict[str, Any]:
        """``config`` with what the weights' own description adds (dims, normalisation). May read files."""
        return config

    def load_weights(self, weights: str) -> None:
        """Fill the tower from a file or folder.

        Raises:
            UserError: the weights are missing or of another shape.
        """
        tensors = read_tensors(weights)
        fill(self.tower, select_prefix(tensors, self.tower, self.prefixes), weights)

    def reset_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds (position indices, rotary tables) anew, in place.

        For a model that was built on the ``meta`` device and then given its weights. Does nothing where an
        encoder has no such buffers.
        """
        saved = self.state_dict().keys()
        buffers = {name: buffer for name, buffer in self.named_buffers() if name not in saved}
        if not buffers:
            return
        device = next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))
        with torch.device("cpu"):
            fresh = dict(build_encoder(self.config).named_buffers())
        for name, buffer in buffers.items():
            if buffer.is_meta:  # a copy into a meta tensor would be lost
                owner, _, leaf = name.rpartition(".")
                self.get_submodule(owner)._buffers[leaf] = fresh[name].to(device, buffer.dtype)
            else:
                buffer.copy_(fresh[name])


class ImageEncoder(Encoder):
    """``forward(pixel_values [B, 3, H, W]) -> (features_BSD, None)``, S = the grid's cells, row by row.

    Class and register tokens are dropped, nothing is pooled.
    """

    modality = "image"
    grid: tuple[int, int]
    """Height and width of the grid of positions."""
    preprocessing: dict[str, Any]
    """``image_size`` (int), ``mean`` and ``std`` (lists, on a 0..1 scale), ``interpolation`` (a name)."""

    @property
    def num_tokens(self) -> int:
        """S, the number of positions per image."""
        return self.grid[0] * self.grid[1]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, None]:
        return self.features(self.check(pixel_values)), None

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        """The features ``[B, S, D]`` of checked pixels."""
        raise TypeError(f"{type(self).__name__} must define features()")

    def check(self, pixel_values: Tensor) -> Tensor:
        """The pixels in the encoder's dtype.

        Raises:
            UserError: the shape is not ``[B, 3, image_size, image_size]``.
        """
        size = self.preprocessing["image_size"]
        if tuple(pixel_values.shape[1:]) != (3, size, size):
            found = list(pixel_values.shape)
            raise UserError(
                f"pixel_values has shape {found}, expected [images, 3, {size}, {size}] for this encoder"
            )
        return pixel_values.to(self.dtype)


class SpeechEncoder(Encoder):
    """``forward(input_features [B, M, F], frames_B) -> (features_BSD, lengths_B)`` with S = ceil(F / 2).

    ``frames_B`` counts the real frames of each clip; a clip's features do not depend on its batch mates, and
    are zero beyond its length.
    """

    modality = "speech"
    num_mel_bins: int
    """M, the height of the spectrogram."""
    max_frames: int
    """The longest clip, in mel frames; longer audio is cut in windows before it comes here."""

    @staticmethod
    def num_tokens(frames: int) -> int:
        """The number of positions of a clip of so many mel frames."""
        return -(-frames // 2)

    def forward(self, input_features: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} must define forward()")


def build_encoder(config: dict[str, Any]) -> Encoder:
    """Build the encoder that ``config`` describes, with random weights and without files or network.

    ``config["type"]`` is one of timm, open_clip, clip, siglip, frames, whisper, beats; the other keys are
    that class's ``Config``.

    Raises:
        UserError: the type, a key or the model name is unknown.
    """
    encoder = encoder_class(config)
    return encoder(parse_config(encoder.Config, config))


def load_encoder(config: dict[str, Any], weights: str | Path | None = None) -> Encoder:
    """Build an encoder and fill it.

    ``weights`` is None (random), a file or folder, or what the library behind the type understands:
    ``pretrained`` (timm), a tag or ``hf-hub:owner/name`` (open_clip), a hub id (clip, siglip), a model name
    (whisper).

    Raises:
        UserError: the weights are missing, unreadable or of another shape.
    """
    encoder = encoder_class(config)
    source = None if weights is None else str(weights)
    built = build_encoder(encoder.complete(config, source))
    if source is not None:
        built.load_weights(source)
    return built


def encoder_class(config: dict[str, Any]) -> type[Encoder]:
    """The class behind ``config["type"]``.

    Raises:
        UserError: the type is unknown.
    """
    kind = config.get("type")
    if kind not in _ENCODERS:
        raise UserError(f"unknown encoder type {kind!r}; known: {', '.join(_ENCODERS)}")
    module, name = _ENCODERS[kind]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def parse_config(cls: type[C], config: dict[str, Any]) -> C:
    """A ``cls`` from ``config`` without its ``type``.

    Raises:
        UserError: a key is unknown or missing.
    """
    values = {key: value for key, value in config.items() if key != "type"}
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    kind = config.get("type")
    for key in values:
        if key not in known:
            raise UserError(f"{kind}: unknown key {key!r}; known: {', '.join(known)}")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{kind}: the key {name!r} is missing")
    return cls(**values)


def add_missing(config: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """``config`` with those of ``found`` that it leaves out or empty."""
    return {**config, **{key: value for key, value in found.items() if not config.get(key)}}


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names most like ``name``, for an error message."""
    return ", ".join(difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)) or "none is close"
