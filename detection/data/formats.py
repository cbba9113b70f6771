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

from unimoe.errors import UserError

from .annotations import FAULTS, REPAIRED, DetectionSet
from .coco import read_coco
from .odvg import read_odvg
from .yolo import read_yolo, yolo_file

logger = logging.getLogger(__name__)


def read_detection(
    path: str | Path, images: str | Path | None = None, strict: bool = True, split: str = "train"
) -> DetectionSet:
    """Read a file of boxes by the table at the top.

    Args:
        path: the file, or the folder of a YOLO data.yaml.
        images: folder of the images, where it is not the file's own.
        strict: raise for a fault that cannot be repaired, and log repairs; without it all faults are only
            collected.
        split: which of a YOLO file's sets is meant.

    Raises:
        UserError: the file is none of these, or with ``strict`` has a fault that cannot be repaired.
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
        _raise_faults(found)
    return found


def _raise_faults(found: DetectionSet) -> None:
    """Raise for faults that cannot be repaired, log those that were."""
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
