"""Image files: read for training, and written in rows for people to look at.

Shapes: B images, S side.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from unimoe.errors import UserError, first_line
from unimoe.files import atomic_file

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Suffixes of files in a folder that are read as images, in lower case."""


def read_image(path: Path, mode: str) -> Image.Image:
    """A decoded image in a mode of Pillow, such as ``RGB``. Raises UserError for a missing or broken file."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except Exception as error:  # on broken files Pillow raises nearly anything, also SyntaxError
        raise _unreadable(path, error) from error


def image_size(path: Path) -> tuple[int, int]:
    """Width and height, by the header alone. Raises UserError for a missing or broken file."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as an image ({first_line(error)})")


def scaled_pixels(image: Image.Image) -> np.ndarray:
    """[3, S, S] float32 in -1..1 of an RGB image."""
    return np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def sheet(images: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """Images [B, 3, S, S] in -1..1 in rows of ``columns``, each pixel ``scale`` times as large."""
    side = images.shape[-1] * scale
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + 4), rows * (side + 4)), "white")
    values = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for place, image in enumerate(values):
        drawn = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
        page.paste(drawn, (place % columns * (side + 4) + 2, place // columns * (side + 4) + 2))
    return page


def write_sheet(path: Path, images: Tensor, columns: int, scale: int = 2) -> None:
    """Write :func:`sheet`, on any device, in the format of the suffix; a folder that is missing is made."""
    page = sheet(images.cpu(), columns, scale)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        page.save(file, format=image_format(path))


def image_format(path: Path) -> str | None:
    """The name that Pillow has for the format of a suffix; None for an unknown one."""
    return Image.registered_extensions().get(path.suffix.lower())
