"""``unimoe detect``: look for things, named in words, in pictures and films.

unimoe detect runs/demo-detection/moe photo.jpg --prompt "cat, red car"
unimoe detect runs/demo-detection/moe photos/ "more/*.png" --prompt "cat, red car" --json --draw seen
"""

import glob
import importlib
import json as json_format
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unimoe.detection.inference.drawing import draw_boxes
from unimoe.detection.inference.onnx import OnnxDetector
from unimoe.detection.inference.predictor import Detector
from unimoe.errors import UserError
from unimoe.media.decode import load_image

log = logging.getLogger(__name__)

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
FILMS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}


def detect(
    model: str,
    images: list[str],
    *,
    prompt: str,
    threshold: float = 0.3,
    top: int = 300,
    rate: float | None = None,
    json: bool = False,
    draw: str | None = None,
) -> None:
    """Look for things in pictures; every label in the answer is one of those asked for.

    Args:
        model: folder of ``unimoe fit``, or a file of ``unimoe export onnx``.
        images: pictures, films, folders of them, or patterns such as "photos/*.jpg".
        prompt: what to look for, separated by commas.
        threshold: lowest score, from 0 to 1.
        top: most detections of a picture for each 256 tokens of the prompt.
        rate: frames of a film to look at per second (default: all).
        json: print one JSON object instead of lines.
        draw: folder for copies of the pictures with the boxes drawn in.
    """
    names = split_prompt(prompt)
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold is {threshold}, expected a number from 0 to 1")
    if top < 1:
        raise UserError(f"--top is {top}, expected at least 1")
    if rate is not None and rate <= 0:
        raise UserError(f"--rate is {rate}, expected a positive number")
    files = find_files(images)
    kind = OnnxDetector if Path(model).suffix == ".onnx" else Detector
    detector = kind.load(model, names)
    answers = []
    for name, picture in pictures_of(files, rate):
        (found,) = detector([picture], threshold, top)
        boxes, labels = found.boxes_K4.tolist(), found.labels_K.tolist()
        rows = [
            {"label": names[label], "label_id": label, "score": score, "box": box}
            for box, score, label in zip(boxes, found.scores_K.tolist(), labels, strict=True)
        ]
        answers.append({"image": name, "width": picture.width, "height": picture.height, "detections": rows})
        if not json:
            print(f"{name}: {len(rows)} found", flush=True)
            for row in rows:
                corners = ", ".join(f"{value:.0f}" for value in row["box"])
                print(f"  {row['score']:.2f}  {row['label']}  ({corners})", flush=True)
        if draw:
            place = Path(draw) / f"{_flat(name)}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{row['label']} {row['score']:.2f}" for row in rows]
            draw_boxes(picture, boxes, labels, texts).save(place, quality=92)
    if json:
        print(json_format.dumps({"model": model, "names": names, "images": answers}, indent=1))


def split_prompt(prompt: str) -> list[str]:
    """The names in a prompt: "cat, red car" -> ["cat", "red car"]. Raises UserError where there are none."""
    names = [name.strip() for name in prompt.split(",")]
    kept = list(dict.fromkeys(name for name in names if name))
    if not kept:
        raise UserError(f'--prompt is {prompt!r}, expected names to look for, such as "cat, red car"')
    if len(kept) < len(names):
        log.warning("--prompt: %d empty or repeated names are left out", len(names) - len(kept))
    return kept


def find_files(places: Sequence[str]) -> list[Path]:
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


def pictures_of(files: Sequence[Path], rate: float | None = None) -> Iterator[tuple[str, Image.Image]]:
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
