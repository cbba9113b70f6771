"""ODVG's lines of objects or captions -> DetectionSet."""

import json
from pathlib import Path
from typing import Any

from unimoe.data.read import read_records
from unimoe.errors import UserError

from .annotations import Category, DetectionSet


def read_odvg(path: Path, images: Path | None = None) -> DetectionSet:
    """ODVG, one image a line, as Open-GroundingDino and mmdetection write it.

    Its classes are those of the label map, ``{"0": "person", ...}`` in ``NAME_label_map.json`` or
    ``label_map.json`` beside it; without one those that appear. A region has one box or several, and a phrase
    that is given by its characters (``tokens_positive``) or searched in the caption.
    """
    found = DetectionSet(path)
    labels = _label_map(path)
    found.categories += [Category(label, name) for label, name in labels.items()]
    row_of = {name: row for row, name in enumerate(labels.values())}
    for index, (source, entry) in enumerate(read_records(path)):
        with found.entry(where := f"line {source.rpartition(':')[2]}"):
            size = (int(entry["width"]), int(entry["height"])) if "width" in entry else None
            file = found.find(entry["filename"], images, where)
            facts: dict[str, Any] = {}
            if "grounding" in entry:
                boxes, rows, spans = _regions(entry["grounding"])
                facts = {"caption": str(entry["grounding"]["caption"]), "spans": spans}
            else:
                instances = entry["detection"]["instances"]
                boxes = [tuple(map(float, instance["bbox"])) for instance in instances]
                names = [_name(instance, labels) for instance in instances]
                for name, instance in zip(names, instances, strict=True):
                    if name not in row_of:
                        row_of[name] = len(row_of)
                        found.categories.append(Category(int(instance.get("label", row_of[name])), name))
                rows = [row_of[name] for name in names]
            found.add(file, index, where, boxes, rows, size=size, **facts)
    found.rows_by_id()
    return found


def _label_map(path: Path) -> dict[int, str]:
    """Label -> name, of the file beside an ODVG file; nothing where there is none."""
    for file in (path.with_name(f"{path.stem}_label_map.json"), path.with_name("label_map.json")):
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                return {int(label): str(name) for label, name in content.items()}
            except (ValueError, AttributeError) as error:
                raise UserError(f'{file}: expected a label map such as {{"0": "person"}}: {error}') from error
    return {}


def _name(instance: dict[str, Any], labels: dict[int, str]) -> str:
    """The class of an object."""
    if "category" in instance:
        return str(instance["category"])
    label = int(instance["label"])
    if label not in labels:
        raise ValueError(f"an object has no category, and its label {label} is in no label map")
    return labels[label]


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
