"""COCO's numbers are pycocotools' own; fixed AP equals an implementation by plain loops."""

import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from unimoe.detection.evaluation.average_precision import COCO_METRICS, evaluate_coco
from unimoe.errors import UserError

CLASSES = [3, 4, 9, 20]  # ids with gaps


def random_set(seed, images=6, federated=False):
    """(ground truth, detections): some detections near objects, some not; crowds among the objects."""
    rng = np.random.default_rng(seed)
    truth = {
        "images": [{"id": i * 7 + 1, "width": 200, "height": 200} for i in range(images)],
        "categories": [
            {"id": id, "name": f"thing {id}", "frequency": "rcff"[place]} for place, id in enumerate(CLASSES)
        ],
        "annotations": [],
    }
    found = []
    for image in truth["images"][:-1]:  # the last image is empty
        for _ in range(rng.integers(1, 9)):
            box = [*rng.uniform(0, 100, 2), *rng.uniform(8, 99, 2)]
            category = int(rng.choice(CLASSES[:3]))  # the last class has no objects
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 5,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0 if federated else int(rng.random() < 0.15),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = (np.array(box) + rng.normal(0, 4, 4)).clip(1).tolist()
                guess = int(rng.choice([category, category, *CLASSES]))
                found.append({"image_id": image["id"], "category_id": guess, "bbox": near})
    for entry in found:
        entry["score"] = round(float(rng.random()), 2)  # with ties
    if federated:
        for entry in truth["annotations"]:
            del entry["iscrowd"], entry["area"]
        for image in truth["images"]:
            chosen = rng.permutation(CLASSES)
            image["neg_category_ids"] = chosen[:1].tolist()
            image["not_exhaustive_category_ids"] = chosen[1:2].tolist()
    return truth, found


@pytest.mark.parametrize("seed", range(3))
def test_coco_metrics_are_those_of_pycocotools(seed, tmp_path):
    truth, found = random_set(seed)
    gt, dt = tmp_path / "gt.json", tmp_path / "dt.json"
    gt.write_text(json.dumps(truth))
    dt.write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(gt)
        judge = COCOeval(coco, coco.loadRes(str(dt)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    result = evaluate_coco(gt, dt)
    assert [result.metrics[name] for name in COCO_METRICS] == pytest.approx(judge.stats.tolist(), abs=1e-9)
    assert evaluate_coco(truth, found).metrics == result.metrics
    measured = [row.ap for row in result.classes if row.objects]
    assert (
        np.mean(measured) == pytest.approx(result.metrics["AP"], abs=1e-9) and 0.05 < np.mean(measured) < 0.95
    )
    assert result.classes[-1].ap == -1 and result.classes[-1].name == "thing 20"


def test_only_some_images_count():
    truth, _ = random_set(0)
    known = {image["id"] for image in truth["images"][:3]}
    found = [{**entry, "score": 1.0} for entry in truth["annotations"] if entry["image_id"] in known]
    assert evaluate_coco(truth, found, only=known).metrics["AP"] == pytest.approx(1)
    assert 0 < evaluate_coco(truth, found).metrics["AP"] < 1


def overlap(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def slow_fixed_ap(truth, found, category, threshold, area, limit):
    """One class, one IoU, one range of areas."""
    own = [d for d in found if d["category_id"] == category]
    own = sorted(own, key=lambda d: -d["score"])[:limit]
    verdicts, objects = [], 0  # (score, image, right or wrong)
    for image in sorted(truth["images"], key=lambda image: image["id"]):
        gts = [
            g for g in truth["annotations"] if (g["image_id"], g["category_id"]) == (image["id"], category)
        ]
        if not gts and category not in image["neg_category_ids"]:
            continue
        inside = [area[0] <= g["bbox"][2] * g["bbox"][3] <= area[1] for g in gts]
        objects += sum(inside)
        taken = [False] * len(gts)
        for d in [d for d in own if d["image_id"] == image["id"]]:
            best = None
            for wanted in (True, False):  # objects of another size only if no other fits
                fits = [
                    (overlap(d["bbox"], g["bbox"]), i)
                    for i, g in enumerate(gts)
                    if inside[i] == wanted and not taken[i] and overlap(d["bbox"], g["bbox"]) >= threshold
                ]
                if fits and best is None:
                    best = max(fits)[1]
            if best is not None:
                taken[best] = True
                if inside[best]:
                    verdicts.append((d["score"], True))
            elif category in image["not_exhaustive_category_ids"]:
                continue
            elif area[0] <= d["bbox"][2] * d["bbox"][3] <= area[1]:
                verdicts.append((d["score"], False))
    if not objects:
        return None
    verdicts.sort(key=lambda verdict: -verdict[0])  # stable: ties stay in order of image and rank
    right = np.cumsum([v for _, v in verdicts])
    points = [(r / objects, r / (i + 1)) for i, r in enumerate(right)]
    best_from = [max((p for r, p in points if r >= recall), default=0.0) for recall in np.linspace(0, 1, 101)]
    return np.mean(best_from)


@pytest.mark.parametrize("limit", [10_000, 6])
@pytest.mark.parametrize("seed", range(3))
def test_fixed_ap_equals_plain_loops(seed, limit, monkeypatch):
    monkeypatch.setattr("unimoe.detection.evaluation.average_precision.PER_CLASS", limit)
    truth, found = random_set(seed, images=12, federated=True)
    result = evaluate_coco(truth, found, "lvis-fixed").metrics
    whole, thresholds = (0, 1e10), np.linspace(0.5, 0.95, 10)

    def mean(categories=CLASSES, thresholds=thresholds, area=whole):
        values = [slow_fixed_ap(truth, found, c, t, area, limit) for c in categories for t in thresholds]
        values = [value for value in values if value is not None]
        return np.mean(values) if values else -1.0

    assert result["AP"] == pytest.approx(mean(), abs=1e-9) and result["AP"] > 0.05
    assert result["AP50"] == pytest.approx(mean(thresholds=[0.5]), abs=1e-9)
    assert result["APs"] == pytest.approx(mean(area=(0, 32**2)), abs=1e-9)
    assert result["APm"] == pytest.approx(mean(area=(32**2, 96**2)), abs=1e-9)
    for name, categories in (("APr", CLASSES[:1]), ("APc", CLASSES[1:2]), ("APf", CLASSES[2:])):
        assert result[name] == pytest.approx(mean(categories), abs=1e-9)


def test_fixed_ap_has_no_limit_per_image():
    """The only right detection comes after 150 wrong ones of its class: COCO stops at a hundred."""
    box = [10, 10, 50, 50]
    truth = {
        "images": [{"id": 1, "neg_category_ids": []}],
        "categories": [{"id": 1, "name": "a", "frequency": "f"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box}],
    }
    noise = [
        {"image_id": 1, "category_id": 1, "bbox": [100 + i, 100, 9, 9], "score": 0.9} for i in range(150)
    ]
    found = [*noise, {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5}]
    assert evaluate_coco(truth, found).metrics["AR100"] == 0
    assert evaluate_coco(truth, found, "lvis-fixed").metrics["AP"] == pytest.approx(1 / 151)


@pytest.mark.parametrize("style", ["coco", "lvis-fixed"])
def test_nothing_found_and_nothing_there(style):
    truth, found = random_set(0, federated=style != "coco")
    assert evaluate_coco(truth, [], style).metrics["AP"] == 0
    truth["annotations"] = []
    assert evaluate_coco(truth, found, style).metrics["AP"] == -1


def test_annotation_ids_do_not_matter():
    """pycocotools takes a match with annotation 0 for a miss, and overwrites one of two with the same id."""
    box = [10, 10, 50, 50]
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": 0, "image_id": image, "category_id": 1, "bbox": box} for image in (1, 2)],
    }
    found = [{"image_id": image, "category_id": 1, "bbox": box, "score": 0.5} for image in (1, 2)]
    assert evaluate_coco(truth, found).metrics["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 5}, r"detections\[0\]: the ground truth has no category with the id 5"),
        ({"image_id": "x1"}, "no image with the id 'x1'"),
        ({"bbox": [1, 2, 3]}, "expected image_id, category_id, bbox"),
        ({"score": float("nan")}, "must be finite"),
    ],
)
def test_detections_that_cannot_be_judged(change, message):
    truth, found = random_set(0)
    with pytest.raises(UserError, match=message):
        evaluate_coco(truth, [{**found[0], **change}])


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "gt.json"
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="not a COCO file"):
        evaluate_coco(path, [])
    truth, found = random_set(0)
    del truth["annotations"][2]["bbox"]
    with pytest.raises(UserError, match=r"annotations\[2\]: 'bbox' is missing"):
        evaluate_coco(truth, found)
