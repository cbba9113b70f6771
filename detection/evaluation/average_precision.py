"""Average precision of boxes: COCO's protocol, and LVIS "fixed AP" (arXiv 2102.01066).

Both run on pycocotools' matching. Fixed AP has no limit on the detections of an image; it keeps the 10,000
best of each class over the whole set, counts them only in images where the class is known to be there or
known to be absent, and lets a detection that matches nothing pass where a class was not annotated
exhaustively.
"""

import contextlib
import io
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from unimoe.data.read import read_records
from unimoe.detection.data.coco import CocoFile, parse_coco
from unimoe.detection.data.values import Id, parse_box, parse_id
from unimoe.errors import UserError

logger = logging.getLogger(__name__)

Style = Literal["coco", "lvis-fixed"]
COCO_METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}
PER_CLASS = 10_000
"""Detections of a class that fixed AP keeps over the whole set."""


@dataclass
class ClassResult:
    """One row of the table of classes; -1 where a class has no objects."""

    id: Id
    """Id as in the file."""
    name: str
    ap: float
    ap50: float
    objects: int
    """Number of objects, crowds left out."""
    detections: int


@dataclass
class Evaluation:
    """What came out of comparing detections with the truth."""

    metrics: dict[str, float]
    """COCO's twelve, or AP, AP50, AP75, APs, APm, APl, APr, APc, APf; -1 where nothing can be measured."""
    classes: list[ClassResult]
    precision_RC: dict[str, np.ndarray]
    """Precision at 101 recalls (0 to 1) for each class, by IoU: ``0.50``, ``0.75`` and ``mean`` (0.50 to
    0.95); -1 for classes without objects."""

    def to_json(self) -> dict[str, Any]:
        return {"metrics": self.metrics, "classes": [vars(result) for result in self.classes]}


def evaluate_coco(
    truth: str | Path | dict[str, Any],
    detections: str | Path | Sequence[dict[str, Any]],
    style: Style = "coco",
    only: Collection[Id] | None = None,
) -> Evaluation:
    """Compare detections with a COCO (or LVIS) ground truth.

    Annotations of images or categories that are not listed, and boxes without area, are left out and logged.

    Args:
        truth: a file, or its content.
        detections: a file of COCO results, or its content: ``image_id``, ``category_id``, ``bbox`` (x, y,
            width, height in pixels) and ``score`` of each. None at all is fine.
        style: ``coco``, or ``lvis-fixed`` for fixed AP with LVIS's verified negatives.
        only: ids of the images that count (default: all that the truth lists); detections in others are an
            error.

    Raises:
        UserError: the truth cannot be read, or the detections are none, or name ids that
            the truth (or ``only``) lacks.
    """
    name = str(truth) if isinstance(truth, str | Path) else "the ground truth"
    content = truth if isinstance(truth, dict) else next((record for _, record in read_records(truth)), None)
    file = parse_coco(content, name)
    _log_faults(file)
    if only is not None:
        ids = set(map(parse_id, only))
        images = [(id, image) for id, image in file.images if id in ids]
        file = replace(file, images=images, boxes=[box for box in file.boxes if box.image in ids])
    numbered = _Numbering(file)
    images = numbered.images()
    base = {"images": images, "categories": numbered.categories()}
    gt = _index({**base, "annotations": numbered.annotations()})
    results = _results(detections, numbered, name)
    evaluator: Any
    if style == "lvis-fixed":
        results = _best_of_each_class(results)
        evaluator = _FederatedEval(gt, _index({**base, "annotations": results}), images)
    else:
        evaluator = COCOeval(gt, _index({**base, "annotations": results}), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints while it works
        evaluator.evaluate()
        evaluator.accumulate()
        if style == "coco":
            evaluator.summarize()
    precision_TRKA = evaluator.eval["precision"][..., -1]  # IoU thresholds, recalls, classes, areas
    metrics: dict[str, float]
    if style == "coco":
        metrics = dict(zip(COCO_METRICS, map(float, evaluator.stats), strict=True))
    else:
        metrics = _fixed_metrics(precision_TRKA, [gt.cats[id] for id in evaluator.params.catIds])
    whole_TRK = precision_TRKA[..., 0]
    rows = _classes(whole_TRK, gt, evaluator.params.catIds, results)
    return Evaluation(
        metrics,
        [replace(row, id=numbered.category_ids[int(row.id) - 1]) for row in rows],
        {"0.50": whole_TRK[0], "0.75": whole_TRK[5], "mean": whole_TRK.mean(axis=0)},
    )


class _Numbering:
    """A ground truth with ids as pycocotools needs them: numbers from 1, in the order of the file's own ids.

    pycocotools takes a match with annotation 0 for none, overwrites one of two annotations with the same id,
    and sorts ids, which may be text.
    """

    def __init__(self, file: CocoFile):
        self.file = file
        self.image_of = {id: number for number, id in enumerate(_ordered(file.images), 1)}
        self.category_of = {id: number for number, id in enumerate(_ordered(file.categories), 1)}
        own = {id: category.id for id, category in file.categories}
        self.category_ids = [own[id] for id in self.category_of]
        """The file's own ids, in order."""

    def images(self) -> list[dict[str, Any]]:
        images = []
        for id, image in self.file.images:
            lists = {
                key: [self.category_of[known] for known in self._known(image.entry.get(key))]
                for key in ("neg_category_ids", "not_exhaustive_category_ids")
            }
            images.append({"id": self.image_of[id], **lists})
        return images

    def categories(self) -> list[dict[str, Any]]:
        return [
            {"id": self.category_of[id], "name": category.name, "frequency": category.frequency}
            for id, category in self.file.categories
        ]

    def annotations(self) -> list[dict[str, Any]]:
        boxes = [box for box in self.file.boxes if box.box[2] > 0 and box.box[3] > 0]
        return [
            {
                "id": number,
                "image_id": self.image_of[box.image],
                "category_id": self.category_of[box.category],
                "bbox": list(box.box),
                "area": box.area,
                "iscrowd": int(box.crowd),
            }
            for number, box in enumerate(boxes, 1)
        ]

    def _known(self, ids: Any) -> list[Id]:
        return [id for id in map(parse_id, ids or []) if id in self.category_of]


def _ordered(entries: Sequence[tuple[Id, Any]]) -> list[Id]:
    return sorted({id for id, _ in entries}, key=lambda id: (isinstance(id, str), id))


def _log_faults(file: CocoFile) -> None:
    """Raise for entries that cannot be read, log what is left out."""
    broken = [fault for fault in file.faults if fault.kind == "malformed"]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0].where}: {broken[0].message}{more}")
    empty = sum(not (box.box[2] > 0 and box.box[3] > 0) for box in file.boxes)
    unlisted = sum(fault.kind in ("unknown image", "unknown category") for fault in file.faults)
    for count, what in (
        (empty, "boxes without area"),
        (unlisted, "annotations of unlisted images or classes"),
    ):
        if count:
            logger.warning("%s: %d %s are left out (`unimoe data check` lists them)", file.name, count, what)


class _FederatedEval(COCOeval):
    """COCO's matching without a limit per image, by LVIS's rules of what counts."""

    params: Any
    evalImgs: list
    _prepare: Callable[[], None]
    _gts: dict[tuple, list[dict]]
    _dts: dict[tuple, list[dict]]

    def __init__(self, truth: COCO, detections: COCO, images: list[dict]):
        super().__init__(truth, detections, "bbox")
        self.params.maxDets = [np.iinfo(np.int64).max]
        self.open = {image["id"]: set(image["not_exhaustive_category_ids"]) for image in images}
        self.absent = {image["id"]: set(image["neg_category_ids"]) for image in images}

    def evaluate(self):
        """Like COCOeval's, but visits only those pairs of an image and a class that count."""
        self._prepare()
        for key in list(self._dts):
            image, category = key
            if key not in self._gts and category not in self.absent[image]:
                del self._dts[key]
        params = self.params
        params.imgIds, params.catIds = np.unique(params.imgIds).tolist(), np.unique(params.catIds).tolist()
        places = {image: place for place, image in enumerate(params.imgIds)}
        rows = {category: row for row, category in enumerate(params.catIds)}
        self.evalImgs = [None] * (len(params.catIds) * len(params.areaRng) * len(params.imgIds))
        pairs = {key for found in (self._gts, self._dts) for key, entries in found.items() if entries}
        self.ious = {pair: self.computeIoU(*pair) for pair in pairs}
        for image, category in pairs:
            for area, area_range in enumerate(params.areaRng):
                result = self.evaluateImg(image, category, area_range, params.maxDets[-1])
                if result and category in self.open[image]:
                    result["dtIgnore"] |= result["dtMatches"] == 0
                row = rows[category] * len(params.areaRng) + area
                self.evalImgs[row * len(params.imgIds) + places[image]] = result
        self._paramsEval = params


def _results(
    detections: str | Path | Sequence[dict[str, Any]], numbered: _Numbering, truth_name: str
) -> list[dict[str, Any]]:
    """The detections, checked, with what pycocotools needs."""
    name = "detections"
    if isinstance(detections, str | Path):
        name, detections = str(detections), [record for _, record in read_records(detections)]
    results = []
    for index, entry in enumerate(detections):
        try:
            x, y, width, height = parse_box(entry["bbox"], "x, y, width, height")
            own = {kind: entry[f"{kind}_id"] for kind in ("image", "category")}
            ids = {kind: parse_id(value) for kind, value in own.items()}
            score = float(entry["score"])
        except (KeyError, TypeError, ValueError) as error:
            wanted = "expected image_id, category_id, bbox (4 numbers) and score"
            raise UserError(f"{name}[{index}]: {wanted}, found {str(entry)[:200]}") from error
        if not np.isfinite([x, y, width, height, score]).all():
            raise UserError(f"{name}[{index}]: bbox and score must be finite numbers, found {entry}")
        for kind, known in (("image", numbered.image_of), ("category", numbered.category_of)):
            if ids[kind] not in known:
                raise UserError(f"{name}[{index}]: {truth_name} has no {kind} with the id {own[kind]!r}")
        results.append(
            {
                "id": index + 1,
                "image_id": numbered.image_of[ids["image"]],
                "category_id": numbered.category_of[ids["category"]],
                "bbox": [x, y, width, height],
                "score": score,
                "area": width * height,
                "iscrowd": 0,
            }
        )
    return results


def _index(content: dict[str, Any]) -> COCO:
    indexed: Any = COCO()
    indexed.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        indexed.createIndex()
    return indexed


def _best_of_each_class(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_class = defaultdict(list)
    for result in results:
        by_class[result["category_id"]].append(result)
    return [
        result
        for group in by_class.values()
        for result in sorted(group, key=lambda result: -result["score"])[:PER_CLASS]
    ]


def _fixed_metrics(
    precision_TRKA: np.ndarray, categories: Sequence[Mapping[str, object]]
) -> dict[str, float]:
    whole_TRK = precision_TRKA[..., 0]
    metrics = {"AP": _mean(whole_TRK), "AP50": _mean(whole_TRK[0]), "AP75": _mean(whole_TRK[5])}
    metrics |= {name: _mean(precision_TRKA[..., area]) for area, name in enumerate(("APs", "APm", "APl"), 1)}
    frequencies = np.array([category.get("frequency") for category in categories])
    metrics |= {name: _mean(whole_TRK[..., frequencies == letter]) for letter, name in FREQUENCIES.items()}
    return metrics


def _classes(whole_TRK: np.ndarray, gt: COCO, ids: Sequence[int], results: list[dict]) -> list[ClassResult]:
    found, there = defaultdict(int), defaultdict(int)
    for result in results:
        found[result["category_id"]] += 1
    for entry in gt.dataset["annotations"]:
        there[entry["category_id"]] += not entry["iscrowd"]
    rows = []
    for column, category in enumerate(gt.cats[id] for id in ids):
        id, precision_TR = category["id"], whole_TRK[..., column]  # numpy's integers do not go into JSON
        ap, ap50 = _mean(precision_TR), _mean(precision_TR[0])
        rows.append(ClassResult(id, category["name"], ap, ap50, there[id], found[id]))
    return rows


def _mean(precision: np.ndarray) -> float:
    """Mean over what was measured (pycocotools writes -1 for the rest); -1 if nothing was."""
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else -1.0
