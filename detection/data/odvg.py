"""ODVG's lines of objects or captions -> DetectionSet."""

import json
from pathlib import Path
from typing import Any

from unimoe.data.read import read_records
from unimoe.errors import UserError

from .annotations import Category, DetectionSet, check_box_format
from .values import Box, parse_box, parse_class, parse_size

Span = tuple[int, int]
_CORNERS = "x1, y1, x2, y2"


def read_odvg(path: Path, images: Path | None = None) -> DetectionSet:
    """ODVG, one image a line, as Open-GroundingDino and mmdetection write it.

    Its classes are those of the label map, ``{"0": "person", ...}`` in ``NAME_label_map.json`` or
    ``label_map.json`` beside it; without one those that appear. A region has one box or several, and a phrase
    (or several) that is given by its characters (``tokens_positive``) or searched in the caption.
    """
    found = DetectionSet(path)
    labels = _label_map(path)
    found.categories += [Category(label, name) for label, name in labels.items()]
    row_of = {name: row for row, name in enumerate(labels.values())}
    raw: list[tuple[Box, tuple[int, int] | None]] = []
    captions = False
    for index, (source, entry) in enumerate(read_records(path)):
        with found.entry(where := f"line {source.rpartition(':')[2]}"):
            if not isinstance(entry, dict):
                raise ValueError(f"found {str(entry)[:80]!r}, expected an object")
            try:
                size = parse_size(entry)
            except ValueError as error:
                found.fault("value", where, f"{error}; the size of the file is taken")
                size = None
            file = found.find(str(entry["filename"]), images, where)
            facts: dict[str, Any] = {}
            if "grounding" in entry:
                captions = True
                boxes, rows, spans = _regions(found, where, entry["grounding"])
                facts = {"caption": str(entry["grounding"]["caption"]), "spans": spans}
            else:
                instances = entry["detection"]["instances"]
                boxes = [parse_box(instance["bbox"], _CORNERS) for instance in instances]
                names = [_name(instance, labels) for instance in instances]
                for name, instance in zip(names, instances, strict=True):
                    if name not in row_of:
                        row_of[name] = len(row_of)
                        id = parse_class(instance["label"]) if "label" in instance else row_of[name]
                        found.categories.append(Category(id, name))
                rows = [row_of[name] for name in names]
            raw += [(box, size) for box in boxes]
            found.add(file, index, where, boxes, rows, size=size, **facts)
    if problem := check_box_format(raw, corners=True):
        found.fault("box format", "bbox", problem)
    if found.samples and (found.categories or not captions):
        found.rows_by_id()
    return found


def _label_map(path: Path) -> dict[int, str]:
    """Label -> name, of the file beside an ODVG file; nothing where there is none."""
    for file in (path.with_name(f"{path.stem}_label_map.json"), path.with_name("label_map.json")):
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8-sig"))
                return {parse_class(label): str(name) for label, name in content.items()}
            except (ValueError, AttributeError) as error:
                raise UserError(f'{file}: expected a label map such as {{"0": "person"}}: {error}') from error
    return {}


def _name(instance: dict[str, Any], labels: dict[int, str]) -> str:
    """The class of an object."""
    if instance.get("category") is not None:
        return str(instance["category"])
    label = parse_class(instance["label"])
    if label not in labels:
        raise ValueError(f"an object has no category, and its label {label} is in no label map")
    return labels[label]


def _regions(
    found: DetectionSet, where: str, grounding: dict[str, Any]
) -> tuple[list[Box], list[int], tuple[tuple[Span, ...], ...]]:
    """(boxes, phrase of each box, characters of each phrase); regions without text are left out."""
    boxes: list[Box] = []
    rows: list[int] = []
    spans: list[tuple[Span, ...]] = []
    caption = str(grounding["caption"])
    for region in grounding["regions"]:
        several = bool(region["bbox"]) and isinstance(region["bbox"][0], list | tuple)
        own = [parse_box(box, _CORNERS) for box in (region["bbox"] if several else [region["bbox"]])]
        if region.get("tokens_positive"):
            pairs = region["tokens_positive"]
            pairs = pairs if isinstance(pairs[0], list | tuple) else [pairs]
            characters = [(int(start), int(end)) for start, end in pairs]
            missing = [pair for pair in characters if not 0 <= pair[0] < pair[1] <= len(caption)]
        else:
            phrases = region["phrase"] if isinstance(region["phrase"], list) else [region["phrase"]]
            starts = [caption.lower().find(str(phrase).lower()) for phrase in phrases]
            missing = [
                phrase for phrase, start in zip(phrases, starts, strict=True) if start < 0 or not phrase
            ]
            characters = [
                (start, start + len(str(phrase))) for phrase, start in zip(phrases, starts, strict=True)
            ]
        if missing or not characters:
            what = missing[0] if missing else region["phrase"]
            found.fault(
                "unknown phrase", where, f"the phrase {what!r} is not in the caption {caption[:80]!r}"
            )
            continue
        boxes += own
        rows += [len(spans)] * len(own)
        spans.append(tuple(characters))
    return boxes, rows, tuple(spans)
