"""The pictures and films that a user names, and what is asked of them."""

import glob
import importlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unimoe.errors import UserError
from unimoe.media.image import load_image

log = logging.getLogger(__name__)

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


FILMS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}


def split_prompt(prompt: str) -> list[str]:
    """The names in a prompt: "cat, red car" -> ["cat", "red car"]. Raises UserError where there are none."""
    names = [name.strip() for name in prompt.split(",")]
    kept = list(dict.fromkeys(name for name in names if name))
    if not kept:
        raise UserError(f'--prompt is {prompt!r}, expected names to look for, such as "cat, red car"')
    if len(kept) < len(names):
        log.warning("--prompt: %d empty or repeated names are left out", len(names) - len(kept))
    return kept


def find_inputs(places: Sequence[str]) -> list[Path]:
    """The pictures and films that files, folders and patterns stand for, in order.

    Raises UserError for a place where there is none.
    """
    known = PICTURES | FILMS
    files: list[Path] = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in known)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(file) for file in glob.glob(place, recursive=True))
            found = [file for file in found if file.is_file() and file.suffix.lower() in known]
        if not found:
            raise UserError(
                f"{place}: no picture is there; expected a file, a folder of pictures or a pattern"
            )
        files += found
    return list(dict.fromkeys(files))


def iter_images(files: Sequence[Path], rate: float | None = None) -> Iterator[tuple[str, Image.Image]]:
    """(name, upright RGB picture) of every file; of a film its frames, named file:number."""
    for file in files:
        if file.suffix.lower() in FILMS:
            yield from frames(file, rate)
        else:
            yield str(file), load_image({"type": "image", "path": str(file)}, str(file))


def frames(file: Path, rate: float | None = None) -> Iterator[tuple[str, Image.Image]]:
    """The frames of a film as they are decoded, ``rate`` a second (None: all).

    Raises UserError where PyAV is missing or cannot read the film.
    """
    try:
        av: Any = importlib.import_module("av")
    except ImportError as error:
        raise UserError(f"{file}: films need PyAV: pip install 'unimoe[video]'") from error
    due = 0.0  # seconds
    try:
        with av.open(str(file)) as film:
            for number, frame in enumerate(film.decode(video=0)):
                if rate is not None and frame.time is not None:
                    if frame.time < due - 1e-6:
                        continue
                    due += 1 / rate
                picture = frame.to_image()
                yield f"{file}:{number:06d}", picture.rotate(frame.rotation, expand=True)
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{file}: cannot decode the film: {error}") from error


def _flat(name: str) -> str:
    """A file name that tells pictures of different folders apart."""
    return name.replace("\\", "/").lstrip("./").replace("/", "_").replace(":", "_")
