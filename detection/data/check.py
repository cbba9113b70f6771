"""What is wrong with a file of boxes and its pictures."""

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
    """Without those that reading leaves out."""
    categories: int
    faults: list[Fault]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_detection(path: str | Path, images: str | Path | None = None, decode: bool = True) -> CheckReport:
    """Read a file of boxes (of YOLO: all its splits) and collect every fault.

    With ``decode`` each picture is opened too, and its size compared with what the file says. Raises
    UserError for what is not a file of boxes at all.
    """
    file = yolo_file(Path(path))
    splits = yolo_splits(file) if file else ["train"]
    sets = [read_detection(path, images, strict=False, split=split) for split in splits]
    faults = dict.fromkeys(fault for found in sets for fault in found.faults)  # categories are in every split
    if decode:
        faults |= dict.fromkeys(fault for found in sets for fault in _pictures(found))
    return CheckReport(
        images=sum(len(found.samples) for found in sets),
        boxes=sum(len(sample.boxes_M4) for found in sets for sample in found.samples),
        categories=len(sets[0].categories),
        faults=list(faults),
    )


def _pictures(found: DetectionSet) -> list[Fault]:
    faults = []
    for sample in found.samples:
        if not sample.path.is_file():
            continue  # reading said so
        try:
            width, height = sample.load().size
        except UserError as error:
            faults.append(
                Fault("unreadable image", sample.source, str(error).removeprefix(f"{sample.source}: "))
            )
            continue
        if sample.size and sample.size != (width, height):
            wanted = f"found {width} x {height} pixels, the file says {sample.size[0]} x {sample.size[1]}"
            faults.append(Fault("size", sample.source, wanted))
    return faults
