"""YOLO's folders of images and labels -> DetectionSet."""

from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps

from unimoe.errors import UserError
from unimoe.media.file_type import IMAGE_SUFFIXES, file_modality

from .annotations import Category, DetectionSet, find_file
from .values import Id, parse_class

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What a YAML file may call each split."""
_NO_IMAGES = {".txt", ".json", ".xml", ".yaml", ".yml", ".csv", ".cache", ".npy", ".npz", ".md"}


def read_yolo(path: Path, images: Path | None = None, split: str = "train") -> DetectionSet:
    """YOLO: ``names`` and the image folders (or lists of files) of each split in a YAML file.

    The labels of ``images/a.jpg`` are in ``labels/a.txt``: a class and (cx, cy, w, h) on a 0..1 scale, or a
    class and the corners of a polygon, of which the box is taken.

    Raises:
        UserError: the file is not YOLO's, or has no such split.
    """
    content = _yolo_content(path)
    names = content["names"]
    ids = dict(enumerate(names)) if isinstance(names, list) else names
    found = DetectionSet(path)
    for key, name in ids.items():
        with found.entry(f"names[{key}]"):
            found.categories.append(Category(parse_class(key), "" if name is None else str(name)))
    row_of = found.rows_by_id()
    places = next((content[key] for key in SPLITS.get(split, (split,)) if content.get(key)), None)
    if places is None:
        raise UserError(f"{path}: has no {split!r}, expected a folder of images or a list of them")
    roots = [images] if images else []
    roots += [path.parent / str(content.get("path") or ""), path.parent]  # the first may be another machine's
    listed = [_listed(str(place), roots) for place in ([places] if isinstance(places, str) else places)]
    for index, file in enumerate(file for files in listed for file in files):
        with found.entry(file.name):
            _read_image(found, index, file, row_of)
    return found


def yolo_file(path: Path) -> Path | None:
    """The YAML file that ``path`` is, or that lies in the folder ``path``; None if it is something else."""
    if path.is_dir():
        return next((path / name for name in ("data.yaml", "data.yml") if (path / name).is_file()), None)
    return path if path.suffix in (".yaml", ".yml") else None


def yolo_splits(path: Path) -> list[str]:
    """Which of train, val and test a YOLO file has.

    Raises:
        UserError: it has none of them.
    """
    content = _yolo_content(path)
    splits = [split for split, keys in SPLITS.items() if any(content.get(key) for key in keys)]
    if not splits:
        raise UserError(f"{path}: has none of {', '.join(SPLITS)}, expected a folder of images for each")
    return splits


def _yolo_content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("names"), dict | list):
        raise UserError(f"{path}: not a YOLO file; expected names, and folders under train and val")
    return content


def _read_image(found: DetectionSet, index: int, file: Path, row_of: dict[Id, int]) -> None:
    if not file.is_file():
        found.fault("missing image", file.name, f"there is no image {file}")
        return
    try:
        with Image.open(file) as image:
            width, height = ImageOps.exif_transpose(image).size
    except Exception as error:  # noqa: BLE001  (on broken files Pillow raises nearly anything)
        found.fault("unreadable image", file.name, f"cannot be decoded: {error}")
        return
    parts = list(file.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    labels = Path(*parts) / f"{file.stem}.txt"
    boxes, rows = [], []
    text = labels.read_text(encoding="utf-8-sig") if labels.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        with found.entry(where := f"{labels}:{number}"):
            if line.strip():
                category, (x1, y1, x2, y2) = _parse_line(line)
                if category in row_of:
                    boxes.append((x1 * width, y1 * height, x2 * width, y2 * height))
                    rows.append(row_of[category])
                else:
                    found.fault("unknown category", where, f"class {category} is not among the names")
    found.add(file, index, str(labels), boxes, rows, size=(width, height))


def _parse_line(line: str) -> tuple[int, tuple[float, float, float, float]]:
    """(class, (x1, y1, x2, y2) on a 0..1 scale)

    Raises:
        ValueError: it is neither a box nor a polygon, or its numbers are pixels.
    """
    category, *values = line.split()
    numbers = [float(value) for value in values]
    box = len(numbers) == 4
    if not box and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(f"expected a class and 4 numbers, or a class and a polygon; found {line!r}")
    if max(numbers) > 2:
        raise ValueError(f"expected numbers between 0 and 1; found {line!r}, which look like pixels")
    if box:
        x, y, w, h = numbers
        return parse_class(category), (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    xs, ys = numbers[::2], numbers[1::2]
    return parse_class(category), (min(xs), min(ys), max(xs), max(ys))


def _listed(place: str, roots: list[Path]) -> list[Path]:
    """The images of a folder, or those that a text file lists, one a line."""
    if folder := find_file(place, roots, folder=True):
        return sorted(file for file in folder.rglob("*") if _is_image(file))
    file = find_file(place, roots)
    if file is None:
        raise UserError(f"{roots[0] / place}: there is no such folder of images")
    lines = (line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines())
    return [find_file(line, [*roots, file.parent]) or roots[0] / line for line in lines if line]


def _is_image(file: Path) -> bool:
    """Whether a file is an image: by its name, else by what it holds."""
    if file.suffix.lower() in IMAGE_SUFFIXES:
        return file.is_file()
    known = file.suffix.lower() in _NO_IMAGES or file.name.startswith(".")
    return not known and file.is_file() and file_modality(file) == "image"
