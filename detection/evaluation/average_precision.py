"""Average precision of boxes: COCO's protocol, and LVIS "fixed AP" (arXiv 2102.01066).

Both run on pycocotools' matching. Fixed AP has no limit on the detections of an image; it keeps the 10,000
best of each class over the whole set, counts them only in images where the class is known to be there or
known to be absent, and lets a detection that matches nothing pass where a class was not annotated
exhaustively.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from unimoe.data.read import read_records
from unimoe.errors import UserError

Style = Literal["coco", "lvis-fixed"]
COCO_METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
FREQUENCIES = {"r": "APr", "c": "APc", "f": "APf"}
PER_CLASS = 10_000
"""Detections of a class that fixed AP keeps over the whole set."""


@dataclass
class ClassResult:
    """One row of the table of classes; -1 where a class has no objects."""

    id: int
    name: str
    ap: float
    ap50: float
    objects: int
    """How many there are, crowds left out."""
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
) -> Evaluation:
    """Compare detections with a COCO (or LVIS) ground truth.

    Args:
        truth: a file, or its content.
        detections: a file of COCO results, or its content: ``image_id``, ``category_id``, ``bbox`` (x, y,
            width, height in pixels) and ``score`` of each. None at all is fine.
        style: ``coco``, or ``lvis-fixed`` for fixed AP with LVIS's verified negatives.

    Raises UserError for ids that the ground truth does not have, and for entries that are not detections.
    """
    truth_name = str(truth) if isinstance(truth, str | Path) else "the ground truth"
    content = _truth(truth, truth_name)
    gt: Any = _index(content)
    results = _results(detections, gt, truth_name)
    judge: Any
    if style == "lvis-fixed":
        results = _best_of_each_class(results)
        judge = _FederatedEval(gt, _index({**content, "annotations": results}), content["images"])
    else:
        judge = COCOeval(gt, _index({**content, "annotations": results}), "bbox")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints as it goes
        judge.evaluate()
        judge.accumulate()
        if style == "coco":
            judge.summarize()
    precision_TRKA = judge.eval["precision"][..., -1]  # IoU thresholds, recalls, classes, areas
    metrics: dict[str, float]
    if style == "coco":
        metrics = dict(zip(COCO_METRICS, map(float, judge.stats), strict=True))
    else:
        metrics = _fixed_metrics(precision_TRKA, [gt.cats[id] for id in judge.params.catIds])
    whole_TRK = precision_TRKA[..., 0]
    return Evaluation(
        metrics,
        _classes(whole_TRK, gt, judge.params.catIds, results),
        {"0.50": whole_TRK[0], "0.75": whole_TRK[5], "mean": whole_TRK.mean(axis=0)},
    )


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
        self.open = {image["id"]: set(image.get("not_exhaustive_category_ids", ())) for image in images}
        self.absent = {image["id"]: set(image.get("neg_category_ids", ())) for image in images}

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


def _truth(truth: str | Path | dict[str, Any], name: str) -> dict[str, Any]:
    """The ground truth with what pycocotools needs: annotations numbered from 1 (it takes a match with number
    0 for none), ``iscrowd`` and ``area`` where they are missing (LVIS has no crowds)."""
    content = truth if isinstance(truth, dict) else next((record for _, record in read_records(truth)), None)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise UserError(f"{name}: not a COCO file; expected images, annotations and categories")
    required = {
        "images": {"id"},
        "categories": {"id", "name"},
        "annotations": {"image_id", "category_id", "bbox"},
    }
    for kind, keys in required.items():
        for index, entry in enumerate(content[kind]):
            if not isinstance(entry, dict) or not keys <= entry.keys():
                raise UserError(f"{name}: {kind}[{index}]: expected {', '.join(sorted(keys))}")
    annotations = [
        {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry, "id": number}
        for number, entry in enumerate(content["annotations"], 1)
    ]
    return {**content, "annotations": annotations}


def _results(
    detections: str | Path | Sequence[dict[str, Any]], gt: COCO, truth_name: str
) -> list[dict[str, Any]]:
    """The detections, checked, with what pycocotools needs."""
    name = "detections"
    if isinstance(detections, str | Path):
        name, detections = str(detections), [record for _, record in read_records(detections)]
    results = []
    for index, entry in enumerate(detections):
        try:
            x, y, width, height = map(float, entry["bbox"])
            image, category, score = entry["image_id"], entry["category_id"], float(entry["score"])
        except (KeyError, TypeError, ValueError) as error:
            wanted = "expected image_id, category_id, bbox (4 numbers) and score"
            raise UserError(f"{name}[{index}]: {wanted}, found {str(entry)[:200]}") from error
        if not np.isfinite([x, y, width, height, score]).all():
            raise UserError(f"{name}[{index}]: bbox and score must be finite numbers, found {entry}")
        for kind, id, known in (("image", image, gt.imgs), ("category", category, gt.cats)):
            if id not in known:
                raise UserError(f"{name}[{index}]: {truth_name} has no {kind} with the id {id!r}")
        results.append(
            {
                "id": index + 1,
                "image_id": image,
                "category_id": category,
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


def _fixed_metrics(precision_TRKA: np.ndarray, categories: list[dict]) -> dict[str, float]:
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
