"""Checks a file of boxes and its images."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unimoe.data.errors import Fault
from unimoe.errors import UserError

from .annotations import DetectionSet
from .formats import read_detection
from .yolo import yolo_file, yolo_splits


@dataclass
class CheckReport:
    """What is in a file, and what is wrong with it."""

    images: int
    boxes: int
    """Boxes without those that reading leaves out."""
    categories: int
    faults: list[Fault]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_detection(path: str | Path, images: str | Path | None = None, decode: bool = True) -> CheckReport:
    """Read a file of boxes (of YOLO: all its splits) and collect every fault.

    With ``decode`` each image is opened too, and its size compared with what the file says.

    Raises:
        UserError: ``path`` is not a file of boxes at all.
    """
    file = yolo_file(Path(path))
    splits = yolo_splits(file) if file else ["train"]
    sets = [read_detection(path, images, strict=False, split=split) for split in splits]
    faults = dict.fromkeys(fault for found in sets for fault in found.faults)  # categories are in every split
    if decode:
        faults |= dict.fromkeys(fault for found in sets for fault in _check_images(found))
    return CheckReport(
        images=sum(len(found.samples) for found in sets),
        boxes=sum(found.boxes for found in sets),
        categories=len(sets[0].categories),
        faults=list(faults),
    )


def _check_images(found: DetectionSet) -> list[Fault]:
    faults = []
    for sample in found.samples:
        if not sample.path.is_file():
            continue  # reading said so
        try:
            size = sample.decode().size
        except UserError as error:
            faults.append(
                Fault("unreadable image", sample.source, str(error).removeprefix(f"{sample.source}: "))
            )
            continue
        if sample.size and sample.size != size:
            faults.append(Fault("size", sample.source, sample.size_problem(size)))
    return faults
