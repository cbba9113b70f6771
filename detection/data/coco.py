"""COCO and LVIS files: one reading of their records, for training and for evaluation."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unimoe.data.errors import Fault
from unimoe.data.read import read_records
from unimoe.errors import UserError

from .annotations import Category, DetectionSet, check_box_format
from .values import Box, Id, parse_box, parse_flag, parse_id, parse_number, parse_size


@dataclass(frozen=True)
class CocoImage:
    """One entry of ``images``."""

    index: int
    id: Any
    """Id as the file writes it."""
    entry: dict[str, Any]
    size: tuple[int, int] | None
    """(width, height), None if unknown."""


@dataclass(frozen=True)
class CocoBox:
    """One entry of ``annotations``."""

    index: int
    image: Id
    category: Id
    box: Box
    """(x, y, width, height) in pixels."""
    area: float
    """The file's own, else that of the box."""
    crowd: bool


@dataclass
class CocoFile:
    """The records of a file that could be read, and what is wrong with the others."""

    name: str
    """What messages call the file."""
    images: list[tuple[Id, CocoImage]] = field(default_factory=list)
    categories: list[tuple[Id, Category]] = field(default_factory=list)
    parents: dict[Id, Any] = field(default_factory=dict)
    """Supercategory of each category."""
    boxes: list[CocoBox] = field(default_factory=list)
    annotated: bool = True
    """False for the images of a test set, whose annotations are not published."""
    faults: list[Fault] = field(default_factory=list)

    def fault(self, kind: str, where: str, message: str) -> None:
        """Note something wrong at an entry of the file."""
        self.faults.append(Fault(kind, f"{self.name}: {where}", message))


def parse_coco(content: Any, name: str) -> CocoFile:
    """Read the content of a COCO or LVIS file.

    Numbers may be text, and null means missing. Annotations of images or categories that are not listed are
    left out, with a fault.

    Raises:
        UserError: ``content`` is not a COCO file.
    """
    lists = ("images", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise UserError(
            f"{name}: not a COCO file; expected an object with the lists images, annotations, categories"
        )
    annotations = content.get("annotations")
    if not isinstance(annotations, list | None):
        raise UserError(f"{name}: not a COCO file; annotations is no list")
    file = CocoFile(name, annotated=annotations is not None)
    for index, entry in _entries(file, "categories", content["categories"]):
        with_id = _required(file, f"categories[{index}]", entry, ("id", "name"))
        if with_id is not None:
            file.categories.append(
                (with_id, Category(entry["id"], str(entry["name"]), entry.get("frequency")))
            )
            file.parents[with_id] = entry.get("supercategory")
    for index, entry in _entries(file, "images", content["images"]):
        where = f"images[{index}]"
        if (id := _required(file, where, entry, ("id",))) is None:
            continue
        try:
            size = parse_size(entry)
        except ValueError as error:
            file.fault("value", where, f"{error}; the size of the file is taken")
            size = None
        file.images.append((id, CocoImage(index, entry["id"], entry, size)))
    known = {"image": {id for id, _ in file.images}, "category": {id for id, _ in file.categories}}
    ids: set[Any] = set()
    for index, entry in _entries(file, "annotations", annotations or []):
        where = f"annotations[{index}]"
        try:
            found = _parse_annotation(file, index, where, entry)
        except KeyError as error:
            file.fault("malformed", where, f"{error.args[0]!r} is missing")
            continue
        except ValueError as error:
            file.fault("malformed", where, str(error))
            continue
        if isinstance(id := entry.get("id"), int | float | str):
            if id in ids:
                file.fault("duplicate annotation id", where, f"annotation id {id} is used twice")
            ids.add(id)
        for kind in ("image", "category"):
            if getattr(found, kind) not in known[kind]:
                id = entry[f"{kind}_id"]
                file.fault(f"unknown {kind}", where, f"there is no {kind} with the id {id}")
                break
        else:
            file.boxes.append(found)
    return file


def read_coco(path: Path, images: Path | None = None) -> DetectionSet:
    """COCO and LVIS. Images lie in ``images``, else in the file's folder or in ``images/`` beside it.

    A category that only groups the others (Roboflow's unused root) is left out: it would be asked for as
    absent.
    """
    file = parse_coco(next((record for _, record in read_records(path)), None), str(path))
    found = DetectionSet(path, annotated=file.annotated)
    found.categories += [category for id, category in file.categories if not _is_root(file, id, category)]
    row_of = found.rows_by_id()
    found.faults += file.faults
    objects: dict[Id, list[CocoBox]] = {}
    for id, image in file.images:
        if id in objects:
            found.fault("duplicate image id", f"images[{image.index}]", f"image id {id} is used twice")
        objects.setdefault(id, [])
    for box in file.boxes:
        objects[box.image].append(box)
    sizes = {id: image.size for id, image in file.images}
    problem = check_box_format([(box.box, sizes[box.image]) for box in file.boxes], corners=False)
    if problem:
        found.fault("box format", "annotations", problem)
    for id, image in file.images:
        with found.entry(f"images[{image.index}]"):
            # LVIS has only the address, which ends in .../val2017/000000397133.jpg
            name = image.entry.get("file_name")
            if not name and image.entry.get("coco_url"):
                name = "/".join(str(image.entry["coco_url"]).split("/")[-2:])
            if not name:
                raise KeyError("file_name")
            negatives = image.entry.get("neg_category_ids")
            if negatives is not None:
                negatives = tuple(row_of[key] for key in map(parse_id, negatives) if key in row_of)
            place = found.find(str(name), images, f"image {image.id}")
            own = objects[id]
            found.add(
                place,
                image.id,
                f"image {image.id} ({name})",
                [(x, y, x + width, y + height) for x, y, width, height in (one.box for one in own)],
                [row_of[one.category] for one in own],
                [one.crowd for one in own],
                image.size,
                negatives=negatives,
            )
    return found


def _entries(file: CocoFile, kind: str, entries: list[Any]) -> Iterable[tuple[int, dict[str, Any]]]:
    for index, entry in enumerate(entries):
        if isinstance(entry, dict):
            yield index, entry
        else:
            file.fault("malformed", f"{kind}[{index}]", f"found {str(entry)[:80]!r}, expected an object")


def _required(file: CocoFile, where: str, entry: dict[str, Any], keys: tuple[str, ...]) -> Id | None:
    """The id of an entry that has all ``keys``; else None, with a fault."""
    if missing := [key for key in keys if entry.get(key) is None]:
        file.fault("malformed", where, f"{missing[0]!r} is missing")
        return None
    try:
        return parse_id(entry["id"])
    except ValueError as error:
        file.fault("malformed", where, str(error))
        return None


def _parse_annotation(file: CocoFile, index: int, where: str, entry: dict[str, Any]) -> CocoBox:
    for key in ("bbox", "image_id", "category_id"):
        if entry.get(key) is None:
            raise KeyError(key)
    box = parse_box(entry["bbox"], "x, y, width, height")
    area = parse_number(entry.get("area"))
    if area is None:
        if entry.get("area") is not None:
            message = f"area is {str(entry['area'])[:80]}, expected a number; that of the box is taken"
            file.fault("value", where, message)
        area = box[2] * box[3]
    image, category = parse_id(entry["image_id"]), parse_id(entry["category_id"])
    return CocoBox(index, image, category, box, area, parse_flag(entry.get("iscrowd")))


def _is_root(file: CocoFile, id: Id, category: Category) -> bool:
    """Whether a category has no boxes, is the supercategory of others, and has none itself."""
    if file.parents.get(id) not in (None, "", "none"):
        return False
    parents = {parent for other, parent in file.parents.items() if other != id}
    return category.name in parents and all(box.category != id for box in file.boxes)
