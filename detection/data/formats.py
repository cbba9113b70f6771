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
from pathlib import Path
from typing import Any

from unimoe.data.read import read_records
from unimoe.errors import UserError

from .annotations import FAULTS, REPAIRED, Category, DetectionSet
from .odvg import read_odvg
from .yolo import read_yolo, yolo_file

logger = logging.getLogger(__name__)


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
    found = DetectionSet(path)
    content = next((record for _, record in read_records(path)), None)
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise UserError(f"{path}: not a COCO file; expected an object with the lists {', '.join(keys)}")
    for index, entry in enumerate(content["categories"]):
        with found.entry(f"categories[{index}]"):
            found.categories.append(Category(int(entry["id"]), str(entry["name"]), entry.get("frequency")))
    row_of = found.rows_by_id()

    objects: dict[Any, list[tuple]] = {}
    for index, entry in enumerate(content["images"]):
        with found.entry(where := f"images[{index}]"):
            if entry["id"] in objects:
                found.fault("duplicate image id", where, f"image id {entry['id']} is used twice")
            objects.setdefault(entry["id"], [])
    ids: set[Any] = set()
    for index, entry in enumerate(content["annotations"]):
        with found.entry(where := f"annotations[{index}]"):
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
        with found.entry(f"images[{index}]"):
            # LVIS has only the address, which ends in .../val2017/000000397133.jpg
            name = entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])
            size = (int(entry["width"]), int(entry["height"])) if "width" in entry else None
            negatives = entry.get("neg_category_ids")
            if negatives is not None:
                negatives = tuple(row_of[category] for category in negatives if category in row_of)
            file = found.find(name, images, f"image {entry['id']}")
            where = f"image {entry['id']} ({name})"
            boxes, rows, crowd = ([fact[i] for fact in objects[entry["id"]]] for i in range(3))
            found.add(file, entry["id"], where, boxes, rows, crowd, size, negatives=negatives)
    return found


def _complain(found: DetectionSet) -> None:
    """Raise for faults that cannot be repaired, tell of those that were."""
    fatal = [fault for fault in found.faults if fault.kind not in REPAIRED]
    if fatal:
        more = f" (and {len(fatal) - 1} more; `unimoe data check {found.path}` lists them)"
        raise UserError(f"{fatal[0].where}: {fatal[0].message}{more if len(fatal) > 1 else ''}")
    for kind, count in Counter(fault.kind for fault in found.faults).items():
        logger.warning(
            "%s: %d times %s; repaired (`unimoe data check` lists them)", found.path, count, FAULTS[kind]
        )
    if not found.samples:
        raise UserError(f"{found.path}: the file holds no images")
