"""Media as callers of transformers' processors give them, as parts of a message."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from unimoe.errors import UserError
from unimoe.media.source import Part

from .configuration import PLACEHOLDERS

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")


def as_parts(modality: str, given: Any, counts: Sequence[int]) -> list[list[Part]]:
    """The media of each prompt.

    Args:
        modality: of all of them.
        given: None, one item, a list of the items of all prompts, or a list of such lists for each prompt.
        counts: the placeholders in each prompt.

    Raises:
        UserError: there are more or fewer items than placeholders, or one is of another type.
    """
    token = PLACEHOLDERS[modality]
    items = [] if given is None else list(given) if _is_list(given, modality) else [given]
    if items and all(_is_list(item, modality) for item in items):
        lengths = [len(item) for item in items]
        if lengths != list(counts):
            found = f"{lengths} {modality} inputs were given"
            raise UserError(f"the prompts hold {list(counts)} {token}, but {found}")
        items = [item for prompt in items for item in prompt]
    if len(items) != sum(counts):
        found = f"{len(items)} {modality} inputs were given"
        raise UserError(f"the text holds {sum(counts)} {token}, but {found}")
    parts = iter([_part(modality, item) for item in items])
    return [[next(parts) for _ in range(count)] for count in counts]


def local_files(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with paths under ``path`` that pipelines of transformers give under ``url``."""

    def part(given: Any) -> Any:
        url = given.get("url") if isinstance(given, dict) else None
        if not isinstance(url, str) or _SCHEME.match(url):
            return given
        return {**{key: value for key, value in given.items() if key != "url"}, "path": url}

    return [
        {
            **turn,
            "content": turn["content"] if isinstance(turn["content"], str) else [*map(part, turn["content"])],
        }
        for turn in messages
    ]


def _is_list(value: Any, modality: str) -> bool:
    """Whether a value is a list of media of this modality, not one of them."""
    if not isinstance(value, (list, tuple)):
        return False
    if modality == "image" or not value:
        return True
    if modality == "video":  # a list of images is one video
        return not _is_image(value[0])
    return not isinstance(value[0], (int, float))  # a list of numbers is one waveform


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim < 4)


def _part(modality: str, value: Any) -> Part:
    if isinstance(value, str):
        return {"type": modality, "url" if value[:5].lower() == "data:" else "path": value}
    if isinstance(value, bytes):
        return {"type": modality, "bytes": value}
    if modality == "image":
        return {"type": modality, modality: _image(value)}
    if modality == "video":
        return {"type": modality, modality: [_image(frame) for frame in value]}
    return {"type": modality, modality: np.asarray(value)}


def _image(value: Any) -> Image.Image | np.ndarray:
    """An image as PIL has it, or as an array [height, width, 3] uint8."""
    if isinstance(value, Image.Image):
        return value
    if not isinstance(value, (np.ndarray, Tensor)):
        expected = "a PIL image, an array, a tensor, a path or a data URL"
        raise UserError(f"an image is given as {type(value).__name__}, expected {expected}")
    array = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        shapes = "[height, width, 3] or [3, height, width]"
        raise UserError(f"an image has the shape {list(array.shape)}, expected {shapes}")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UserError("an image of floats has values outside of 0..1; give 0..1, or uint8")
        array = (array * 255).round()
    return array.astype(np.uint8)
