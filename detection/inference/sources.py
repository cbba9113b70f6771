"""The images and videos that a user names, and the names to look for in them."""

import csv
import glob
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from unimoe.detection.model.prompt import clean_name
from unimoe.errors import UserError, first_line
from unimoe.media.container import open_container, require_av
from unimoe.media.file_type import IMAGE_SUFFIXES, VIDEO_SUFFIXES, file_modality
from unimoe.media.image import load_image

log = logging.getLogger(__name__)

# ---------------------------------------------------------------- names


def split_prompt(prompt: str) -> list[str]:
    """The names in a prompt, each once: "cat, red car" -> ["cat", "red car"].

    Names are separated by commas, or as in Grounding DINO's guides by full stops ("a cat. a remote
    control."). A name that holds a comma stands in double quotes.

    Raises:
        UserError: there are none.
    """
    (row,) = csv.reader([" ".join(prompt.split())], skipinitialspace=True)
    names = _sentences(row[0]) if len(row) == 1 and not prompt.lstrip().startswith('"') else row
    return _unique_names(names, f"--prompt is {prompt!r}")


def _sentences(text: str) -> list[str]:
    """Parts that end with a full stop before a blank or the end: not the one in "3.5 inch disk"."""
    return [part for part in (text + " ").split(". ") if part.strip()]


def _unique_names(names: Sequence[str], found: str) -> list[str]:
    kept: dict[str, str] = {}
    for name in names:
        if clean_name(name):
            kept.setdefault(clean_name(name, brackets=True), name.strip().rstrip(" ."))
    if not kept:
        raise UserError(f'{found}, expected names to look for, such as "cat, red car"')
    if len(kept) < len(names):
        log.warning("%d empty or repeated names are left out", len(names) - len(kept))
    return list(kept.values())


def read_names(path: str | Path) -> tuple[list[str], dict[str, float]]:
    """Names from a file, and the thresholds of those that have one of their own.

    A text file has one name a line; JSON a list of names, an object from names to thresholds (null for the
    common one), or a COCO file, whose categories are taken.

    Raises:
        UserError: the file cannot be read, or holds no names.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the names: {first_line(error)}") from error
    thresholds: dict[str, float] = {}
    if path.suffix != ".json":
        return _unique_names(text.splitlines(), f"{path} holds no names"), thresholds
    expected = "expected a list of names, an object from names to thresholds, or a COCO file"
    try:
        content = json.loads(text)
        if isinstance(content, dict) and isinstance(content.get("categories"), list):
            content = [entry["name"] for entry in content["categories"]]
        if isinstance(content, dict):
            thresholds = {name: value for name, value in content.items() if value is not None}
            content = list(content)
        if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
            raise ValueError(expected)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {expected}: {first_line(error)}") from error
    names = _unique_names(content, f"{path} holds no names")
    return names, {name.strip().rstrip(" ."): value for name, value in thresholds.items()}


def asked_names(prompt: str | None, names: str | None) -> tuple[list[str], dict[str, float]]:
    """The names that ``--prompt`` or the file ``--names`` gives, and thresholds of their own.

    Raises:
        UserError: both are given or neither, or there are no names.
    """
    if (prompt is None) == (names is None):
        raise UserError('say what to look for: --prompt "cat, red car", or --names FILE (one of the two)')
    return (split_prompt(prompt), {}) if prompt is not None else read_names(str(names))


def class_thresholds(
    names: Sequence[str], threshold: float, own: Mapping[str, float], setting: str = "--class-threshold"
) -> list[float]:
    """The lowest score of each name: its ``own``, else ``threshold``.

    Raises:
        UserError: one is no number from 0 to 1, or belongs to no name.
    """
    for name, value in {"": threshold, **own}.items():
        flag = f"{setting} of {name!r}" if name else "--threshold"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise UserError(f"{flag} is {value}, expected a number from 0 to 1")
        if name and name not in names:
            raise UserError(f"{flag}: {name!r} is not asked for; names are {', '.join(names[:8])}")
    return [own.get(name, threshold) for name in names]


# ---------------------------------------------------------------- files


def find_inputs(places: Sequence[str]) -> list[Path]:
    """The images and videos that files, folders and patterns stand for, in order.

    What a file in a folder is, is decided by its content; one that is named like an image or a video is taken
    in any case, so that a broken one is reported.

    Raises:
        UserError: a place holds none.
    """
    files: list[Path] = []
    for place in places:
        path = Path(place)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _is_input(file))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(file for file in map(Path, glob.glob(place, recursive=True)) if _is_input(file))
        if not found:
            raise UserError(f"{place}: no image is there; expected a file, a folder of images or a pattern")
        files += found
    return list(dict.fromkeys(files))


def _is_input(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        return file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES or file_modality(file) is not None
    except OSError:
        return False


def iter_images(
    files: Sequence[Path], rate: float | None = None
) -> Iterator[tuple[str, Image.Image | UserError]]:
    """(name, upright RGB image) of every file; of a video its frames, named file:number.

    What is wrong with a file stands in the place of its image, or behind the frames before it, so that the
    others can still be searched.
    """
    for file in files:
        try:
            if _is_video(file):
                yield from video_frames(file, rate)
            else:
                yield str(file), load_image({"type": "image", "path": str(file)}, str(file))
        except UserError as error:
            yield str(file), error


def _is_video(file: Path) -> bool:
    try:
        found = file_modality(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    return found == "video" or (found is None and file.suffix.lower() in VIDEO_SUFFIXES)


def video_frames(file: Path, rate: float | None = None) -> Iterator[tuple[str, Image.Image]]:
    """The frames of a video as they are decoded, ``rate`` a second (None: all).

    The clock begins with the first frame; in a pause no frame is due.

    Raises:
        UserError: PyAV is missing, or cannot read the video.
    """
    av = require_av(f"{file}: a video")
    start, due = None, 0
    try:
        with file.open("rb") as encoded, open_container(encoded, f"{file}: a video") as video:
            if not video.streams.video:
                held = ", ".join(sorted({stream.type for stream in video.streams})) or "nothing"
                raise UserError(f"{file}: the video holds no images; it holds {held}")
            for number, frame in enumerate(video.decode(video=0)):
                if rate is not None and frame.time is not None:
                    start = frame.time if start is None else start
                    tick = math.floor((frame.time - start) * rate + 1e-6)
                    if tick < due:
                        continue
                    due = tick + 1
                image = frame.to_image()
                yield f"{file}:{number:06d}", image.rotate(frame.rotation, expand=True)
    except UserError:
        raise
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise UserError(f"{file}: cannot decode the video: {first_line(error)}") from error


class OutputNames:
    """Names for the drawn copies of images: no two images share one.

    >>> names = OutputNames()
    >>> names("photos/x.png"), names("photos_x.png")
    ('photos_x.png', 'photos_x.png-2')
    """

    def __init__(self) -> None:
        self._used: set[str] = set()

    def __call__(self, name: str) -> str:
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        flat = "_".join(parts).replace(":", "_").lstrip(".")
        number, chosen = 1, flat
        while chosen.lower() in self._used:  # some file systems know no case
            number += 1
            chosen = f"{flat}-{number}"
        self._used.add(chosen.lower())
        return chosen
