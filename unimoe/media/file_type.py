"""Telling images and videos apart by what a file holds, not by its name."""

from pathlib import Path
from typing import Literal

from PIL import Image

from .source import media_format

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".gif",
        ".avif",
        ".heic",
        ".heif",
        ".jp2",
        ".j2k",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".mpo",
        ".tga",
    ]
)
VIDEO_SUFFIXES = frozenset(
    [
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".m2ts",
        ".mts",
        ".wmv",
        ".flv",
        ".ogv",
        ".3gp",
        ".3g2",
    ]
)


def file_modality(path: str | Path) -> Literal["image", "video"] | None:
    """``image`` or ``video`` by the content of a file, None for anything else.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        found = media_format(file.read(256))
    if found == "video":
        return "video"
    try:
        with Image.open(path):
            return "image"
    except Exception:  # noqa: BLE001  (Pillow's plugins raise nearly anything on files that are not theirs)
        return None
