"""Files of boxes -> DetectionSet.

===========================  ===================================================================
``x.json``                   COCO, also LVIS (verified negatives, frequencies of classes)
``x.jsonl``                  ODVG: objects with classes, or a caption whose phrases have boxes
``data.yaml`` or its folder  YOLO: ``images/`` beside ``labels/``
===========================  ===================================================================

What is wrong with a file is collected in ``faults``; what can be repaired is.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps

from unimoe.data.readers import read_records
from unimoe.errors import UserError

from .dataset import FAULTS, MILD, Category, DetectionSet
from .prompt import clean_name

logger = logging.getLogger(__name__)

_PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def read_detection(
    path: str | Path, images: str | Path | None = None, strict: bool = True, split: str = "train"
) -> DetectionSet:
    """Read a file of boxes by the table at the top.

    ``images`` is the folder of the pictures where it is not the file's own; ``split`` says which of a YOLO
    file's sets is meant. With ``strict`` a fault that cannot be repaired raises UserError, and repairs are
    logged; without it all faults are only collected.
    """
    path = yolo_file(Path(path)) or Path(path)
    folder = Path(images) if images else None
    if path.suffix not in (".json", ".jsonl", ".yaml", ".yml"):
        raise UserError(
            f"{path}: expected COCO or LVIS .json, ODVG .jsonl, or a YOLO data.yaml or the folder it lies in"
        )
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix == ".json":
        found = read_coco(path, folder)
    elif path.suffix == ".jsonl":
        found = read_odvg(path, folder)
    else:
        found = read_yolo(path, folder, split)
    if strict:
        _complain(found)
    return found


def read_coco(path: Path, images: Path | None = None) -> DetectionSet:
    """COCO and LVIS. Pictures lie in ``images``, else in the file's folder or in ``images/`` beside it."""
    found = DetectionSet(path, [], [])
    content = next((record for _, record in read_records(path)), None)
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"{path}: not a COCO file; expected an object with the lists {', '.join(keys)}")
    for index, entry in enumerate(content["categories"]):
        with _collect(found, f"categories[{index}]"):
            found.categories.append(Category(int(entry["id"]), str(entry["name"]), entry.get("frequency")))
    row_of = _rows(found)

    objects: dict[Any, list[tuple]] = {}
    for index, entry in enumerate(content["images"]):
        with _collect(found, where := f"images[{index}]"):
            if entry["id"] in objects:
                found.fault("duplicate image id", where, f"image id {entry['id']} is used twice")
            objects.setdefault(entry["id"], [])
    ids: set[Any] = set()
    for index, entry in enumerate(content["annotations"]):
        with _collect(found, where := f"annotations[{index}]"):
            x, y, width, height = map(float, entry["bbox"])
            image, category = entry["image_id"], entry["category_id"]
            if entry["id"] in ids:
                found.fault("duplicate annotation id", where, f"annotation id {entry['id']} is used twice")
            ids.add(entry["id"])
            if image not in objects:
                found.fault("unknown image", where, f"there is no image with the id {image}")
            elif category not in row_of:
                found.fault("unknown category", where, f"there is no category with the id {category}")
            else:
                box = (x, y, x + width, y + height)
                objects[image].append((box, row_of[category], bool(entry.get("iscrowd", 0))))

    for index, entry in enumerate(content["images"]):
        with _collect(found, f"images[{index}]"):
            # LVIS has only the address, which ends in .../val2017/000000397133.jpg
            name = entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])
            size = (int(entry["width"]), int(entry["height"])) if "width" in entry else None
            negatives = entry.get("neg_category_ids")
            if negatives is not None:
                negatives = tuple(row_of[category] for category in negatives if category in row_of)
            file = _find(found, name, images, f"image {entry['id']}")
            where = f"image {entry['id']} ({name})"
            boxes, rows, crowd = ([fact[i] for fact in objects[entry["id"]]] for i in range(3))
            found.add(file, entry["id"], where, boxes, rows, crowd, size, negatives=negatives)
    return found


def read_odvg(path: Path, images: Path | None = None) -> DetectionSet:
    """ODVG, one image a line, as Open-GroundingDino and mmdetection write it.

    Its classes are those that appear. A region has one box or several, and a phrase that is given by its
    characters (``tokens_positive``) or searched in the caption.
    """
    found = DetectionSet(path, [], [])
    row_of: dict[str, int] = {}
    for index, (source, entry) in enumerate(read_records(path)):
        with _collect(found, where := f"line {source.rpartition(':')[2]}"):
            size = (int(entry["width"]), int(entry["height"])) if "width" in entry else None
            file = _find(found, entry["filename"], images, where)
            facts: dict[str, Any] = {}
            if "grounding" in entry:
                boxes, rows, spans = _regions(entry["grounding"])
                facts = {"caption": str(entry["grounding"]["caption"]), "spans": spans}
            else:
                instances = entry["detection"]["instances"]
                boxes = [tuple(map(float, instance["bbox"])) for instance in instances]
                for instance in instances:
                    name = str(instance["category"])
                    if name not in row_of:
                        row_of[name] = len(row_of)
                        found.categories.append(Category(int(instance.get("label", row_of[name])), name))
                rows = [row_of[str(instance["category"])] for instance in instances]
            found.add(file, index, where, boxes, rows, size=size, **facts)
    _rows(found)
    return found


def read_yolo(path: Path, images: Path | None = None, split: str = "train") -> DetectionSet:
    """YOLO: ``names`` and the image folders (or lists of files) of each split in a YAML file.

    The labels of ``images/a.jpg`` are in ``labels/a.txt``: a class and (cx, cy, w, h) on a 0..1 scale, or a
    class and the corners of a polygon, of which the box is taken.
    """
    content = _yolo_content(path)
    names = content["names"]
    ids = dict(enumerate(names)) if isinstance(names, list) else names
    found = DetectionSet(path, [], [])
    for key, name in ids.items():
        with _collect(found, f"names[{key}]"):
            found.categories.append(Category(int(key), str(name)))
    row_of = _rows(found)
    places = content.get(split)
    if places is None:
        raise UserError(f"{path}: has no {split!r}, expected a folder of images or a list of them")
    root = images or path.parent / (content.get("path") or "")
    root = root if root.is_dir() else path.parent  # the path of the machine that wrote the file
    listed = [_listed(root / place, root) for place in ([places] if isinstance(places, str) else places)]
    for index, file in enumerate(file for files in listed for file in files):
        with _collect(found, file.name):
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
        with _collect(found, where := f"{labels}:{number}"):
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


def _regions(grounding: dict) -> tuple[list, list[int], tuple]:
    """(boxes, phrase of each box, characters of each phrase)"""
    boxes, rows, spans = [], [], []
    for row, region in enumerate(grounding["regions"]):
        own = region["bbox"] if isinstance(region["bbox"][0], list) else [region["bbox"]]
        boxes += [tuple(map(float, box)) for box in own]
        rows += [row] * len(own)
        if "tokens_positive" in region:
            pairs = region["tokens_positive"]
            pairs = pairs if isinstance(pairs[0], list) else [pairs]
            spans.append(tuple((int(start), int(end)) for start, end in pairs))
        else:
            start = grounding["caption"].lower().index(str(region["phrase"]).lower())
            spans.append(((start, start + len(str(region["phrase"]))),))
    return boxes, rows, tuple(spans)


def _find(found: DetectionSet, name: str, images: Path | None, where: str) -> Path:
    """Where a picture lies; a fault if nowhere."""
    roots = (
        [images] if images else [found.path.parent, found.path.parent / "images", found.path.parent.parent]
    )
    for root in roots:
        if (root / name).is_file():
            return root / name
    found.fault("missing image", where, f"no picture {roots[0] / name}; is the folder of images right?")
    return roots[0] / name


def _listed(place: Path, root: Path) -> list[Path]:
    """The pictures of a folder, or those that a text file lists, one a line."""
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix.lower() in _PICTURES)
    if not place.is_file():
        raise UserError(f"{place}: there is no such folder of images")
    return [root / line.strip() for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]


def _rows(found: DetectionSet) -> dict[int, int]:
    """Category id -> its row; faults for ids that are used twice and names that are empty."""
    row_of: dict[int, int] = {}
    for row, category in enumerate(found.categories):
        where = f"category {category.id}"
        if category.id in row_of:
            other = found.categories[row_of[category.id]].name
            found.fault("duplicate category id", where, f"{category.name!r} has the id of {other!r}")
        if not clean_name(category.name):
            found.fault("empty name", where, f"found the name {category.name!r}, expected words")
        row_of[category.id] = row
    return row_of


@contextmanager
def _collect(found: DetectionSet, entry: str) -> Iterator[None]:
    """What is wrong with the shape of an entry becomes a fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        found.fault("malformed", entry, what)


def _complain(found: DetectionSet) -> None:
    """Raise for faults that cannot be repaired, tell of those that were."""
    fatal = [fault for fault in found.faults if fault.kind not in MILD]
    if fatal:
        more = f" (and {len(fatal) - 1} more; `unimoe data check {found.path}` lists them)"
        raise UserError(f"{fatal[0].where}: {fatal[0].message}{more if len(fatal) > 1 else ''}")
    for kind, count in Counter(fault.kind for fault in found.faults).items():
        logger.warning(
            "%s: %d times %s; repaired (`unimoe data check` lists them)", found.path, count, FAULTS[kind]
        )
    if not found.samples:
        raise UserError(f"{found.path}: the file holds no images")
