"""``unimoe detect``: find objects that are named in words, in images and videos.

unimoe detect runs/demo-detection/moe photo.jpg --prompt "cat, red car"
unimoe detect runs/demo-detection/moe photos/ "more/*.png" --names names.txt --json --draw seen
"""

import json as json_format
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.utils.logging import disable_progress_bar

from unimoe.detection.inference.detect import Detections
from unimoe.detection.inference.drawing import draw_boxes
from unimoe.detection.inference.onnx import OnnxDetector
from unimoe.detection.inference.predictor import Detector
from unimoe.detection.inference.sources import (
    OutputNames,
    asked_names,
    class_thresholds,
    find_inputs,
    iter_images,
)
from unimoe.errors import UserError

log = logging.getLogger(__name__)


def detect(
    model: str,
    images: list[str],
    *,
    prompt: str | None = None,
    names: str | None = None,
    threshold: float = 0.3,
    class_threshold: list[str] | None = None,
    top: int = 300,
    one_label: bool = False,
    nms: float | None = None,
    rate: float | None = None,
    json: bool = False,
    draw: str | None = None,
) -> int:
    """Find objects in images by their names; every predicted label is one of the given names.

    An image that cannot be read is reported and skipped; the exit status is then 1.

    Args:
        model: folder of ``unimoe fit``, or a file of ``unimoe export onnx``.
        images: images, videos, folders of them, or patterns such as "photos/*.jpg".
        prompt: names to look for: "cat, red car" or "a cat. a red car."; put a name that contains a comma in
            double quotes.
        names: file of names: one per line, or JSON (a list, an object from names to thresholds, or a COCO
            file).
        threshold: minimum score, from 0 to 1.
        class_threshold: minimum score of single names, such as "red car=0.5".
        top: maximum number of detections per image for each 256 tokens of the prompt.
        one_label: keep only the best label of each box instead of every label over the threshold.
        nms: remove boxes that overlap a better one of the same label (with --one-label: of any label) by more
            than this IoU, from 0 to 1.
        rate: frames of a video to process per second (default: all).
        json: print one JSON object instead of lines.
        draw: folder for copies of the images with the boxes drawn.
    """
    labels, own = asked_names(prompt, names)
    thresholds = class_thresholds(labels, threshold, own | _class_thresholds(class_threshold))
    if top < 1:
        raise UserError(f"--top is {top}, expected at least 1")
    if nms is not None and not 0 <= nms <= 1:
        raise UserError(f"--nms is {nms}, expected an IoU from 0 to 1")
    if rate is not None and rate <= 0:
        raise UserError(f"--rate is {rate}, expected a positive number")
    files = find_inputs(images)
    disable_progress_bar()  # transformers' own
    detector = (OnnxDetector if Path(model).suffix == ".onnx" else Detector).load(model, labels)
    answers: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    output_name = OutputNames()
    for name, image in iter_images(files, rate):
        if isinstance(image, UserError):
            if len(files) == 1 and not answers:
                raise image
            errors.append({"image": name, "error": str(image)})
            log.error("%s", image)
            continue
        (found,) = detector([image], thresholds, top, one_label, nms)
        rows = _rows(found, labels)
        answers.append({"image": name, "width": image.width, "height": image.height, "detections": rows})
        if not json:
            _print_rows(name, rows)
        if draw:
            _draw(image, found, rows, Path(draw) / f"{output_name(name)}.jpg")
    if json:
        answer = {"model": model, "names": labels, "images": answers}
        print(json_format.dumps(answer | ({"errors": errors} if errors else {}), indent=1))
    if errors:
        log.error("%d of %d files could not be read", len({row["image"] for row in errors}), len(files))
    return int(bool(errors))


def _class_thresholds(given: Iterable[str] | None) -> dict[str, float]:
    """Thresholds by class, from entries such as "red car=0.5"."""
    found = {}
    for entry in given or ():
        name, _, value = entry.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UserError(
                f'--class-threshold is {entry!r}, expected a name and a number: "red car=0.5"'
            ) from None
    return found


def _rows(found: Detections, labels: Sequence[str]) -> list[dict[str, Any]]:
    boxes, scores, indices = found.boxes_K4.tolist(), found.scores_K.tolist(), found.labels_K.tolist()
    return [
        {"label": labels[index], "label_id": index, "score": score, "box": box}
        for box, score, index in zip(boxes, scores, indices, strict=True)
    ]


def _print_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"{name}: {len(rows)} found", flush=True)
    for row in rows:
        corners = ", ".join(f"{value:.0f}" for value in row["box"])
        print(f"  {row['score']:.2f}  {row['label']}  ({corners})", flush=True)


def _draw(image: Image.Image, found: Detections, rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f"{row['label']} {row['score']:.2f}" for row in rows]
    draw_boxes(image, found.boxes_K4.tolist(), found.labels_K.tolist(), texts).save(path, quality=92)
