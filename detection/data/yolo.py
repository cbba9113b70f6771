"""YOLO's folders of pictures and labels -> DetectionSet."""

from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps

from unimoe.errors import UserError

from .annotations import Category, DetectionSet

_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def read_yolo(path: Path, images: Path | None = None, split: str = "train") -> DetectionSet:
    """YOLO: ``names`` and the image folders (or lists of files) of each split in a YAML file.

    The labels of ``images/a.jpg`` are in ``labels/a.txt``: a class and (cx, cy, w, h) on a 0..1 scale, or a
    class and the corners of a polygon, of which the box is taken.
    """
    content = _yolo_content(path)
    names = content["names"]
    ids = dict(enumerate(names)) if isinstance(names, list) else names
    found = DetectionSet(path)
    for key, name in ids.items():
        with found.entry(f"names[{key}]"):
            found.categories.append(Category(int(key), str(name)))
    row_of = found.rows_by_id()
    places = content.get(split)
    if places is None:
        raise UserError(f"{path}: has no {split!r}, expected a folder of images or a list of them")
    root = images or path.parent / (content.get("path") or "")
    root = root if root.is_dir() else path.parent  # the path of the machine that wrote the file
    listed = [_listed(root / place, root) for place in ([places] if isinstance(places, str) else places)]
    for index, file in enumerate(file for files in listed for file in files):
        with found.entry(file.name):
            _read_yolo_image(found, index, file, row_of)
    return found


def yolo_file(path: Path) -> Path | None:
    """The YAML file that ``path`` is, or that lies in the folder ``path``; None if it is something else."""
    if path.is_dir():
        return next((path / name for name in ("data.yaml", "data.yml") if (path / name).is_file()), None)
    return path if path.suffix in (".yaml", ".yml") else None


def yolo_splits(path: Path) -> list[str]:
    """Which of train, val and test a YOLO file has."""
    content = _yolo_content(path)
    return [split for split in ("train", "val", "test") if content.get(split)]


def _yolo_content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("names"), dict | list):
        raise UserError(f"{path}: not a YOLO file; expected names, and folders under train and val")
    return content


def _read_yolo_image(found: DetectionSet, index: int, file: Path, row_of: dict[int, int]) -> None:
    if not file.is_file():
        found.fault("missing image", file.name, f"there is no picture {file}")
        return
    try:
        with Image.open(file) as picture:
            width, height = ImageOps.exif_transpose(picture).size
    except OSError as error:
        found.fault("unreadable image", file.name, f"cannot be decoded: {error}")
        return
    parts = list(file.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = Path(*parts) / f"{file.stem}.txt"
    boxes, rows = [], []
    for number, line in enumerate(labels.read_text().splitlines() if labels.is_file() else [], 1):
        with found.entry(where := f"{labels}:{number}"):
            if line.strip():
                category, (x1, y1, x2, y2) = _yolo_line(line)
                if category in row_of:
                    boxes.append((x1 * width, y1 * height, x2 * width, y2 * height))
                    rows.append(row_of[category])
                else:
                    found.fault("unknown category", where, f"class {category} is not among the names")
    found.add(file, index, str(labels), boxes, rows, size=(width, height))


def _yolo_line(line: str) -> tuple[int, tuple[float, float, float, float]]:
    """(class, (x1, y1, x2, y2) on a 0..1 scale)"""
    category, *values = line.split()
    numbers = [float(value) for value in values]
    if len(numbers) == 4:
        x, y, w, h = numbers
        return int(category), (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    if len(numbers) < 6 or len(numbers) % 2:
        raise ValueError(f"expected a class and 4 numbers, or a class and a polygon; found {line!r}")
    xs, ys = numbers[::2], numbers[1::2]
    return int(category), (min(xs), min(ys), max(xs), max(ys))


def _listed(place: Path, root: Path) -> list[Path]:
    """The pictures of a folder, or those that a text file lists, one a line."""
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix.lower() in _PICTURES)
    if not place.is_file():
        raise UserError(f"{place}: there is no such folder of images")
    return [root / line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
