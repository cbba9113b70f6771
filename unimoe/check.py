"""``unimoe data check``: what is wrong with a data file, and where."""

import json as json_format
from collections import Counter

from unimoe.detection.check import check_detection
from unimoe.detection.dataset import FAULTS


def check(
    path: str, images: str | None = None, decode: bool = True, show: int = 20, json: bool = False
) -> int:
    """Say what is wrong with a file of boxes: COCO or LVIS JSON, ODVG JSONL, or a YOLO data.yaml.

    The exit status is 1 if there is anything.

    Args:
        path: the file, or a YOLO folder.
        images: folder of the pictures, where it is not the file's own.
        decode: also open every picture, to compare its size and find broken ones.
        show: faults of each kind to list.
        json: print everything as one JSON object.
    """
    report = check_detection(path, images, decode)
    if json:
        print(json_format.dumps(report.to_json(), indent=1))
        return int(bool(report.faults))
    print(f"{report.images} images, {report.boxes} boxes of {report.categories} categories")
    counts = Counter(fault.kind for fault in report.faults)
    for kind, count in counts.items():
        print(f"\n{FAULTS[kind]}: {count} times")
        for fault in [fault for fault in report.faults if fault.kind == kind][:show]:
            print(f"  {fault.where}: {fault.message}")
        if count > show:
            print(f"  and {count - show} more (--show N)")
    if not counts:
        print("no faults found")
    return int(bool(counts))
