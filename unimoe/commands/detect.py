"""``unimoe detect``: look for things, named in words, in pictures and films.

unimoe detect runs/demo-detection/moe photo.jpg --prompt "cat, red car"
unimoe detect runs/demo-detection/moe photos/ "more/*.png" --prompt "cat, red car" --json --draw seen
"""

import json as json_format
import logging
from pathlib import Path

from unimoe.detection.inference.drawing import draw_boxes
from unimoe.detection.inference.onnx import OnnxDetector
from unimoe.detection.inference.predictor import Detector
from unimoe.detection.inference.sources import _flat, find_inputs, iter_images, split_prompt
from unimoe.errors import UserError

log = logging.getLogger(__name__)


def detect(
    model: str,
    images: list[str],
    *,
    prompt: str,
    threshold: float = 0.3,
    top: int = 300,
    rate: float | None = None,
    json: bool = False,
    draw: str | None = None,
) -> None:
    """Look for things in pictures; every label in the answer is one of those asked for.

    Args:
        model: folder of ``unimoe fit``, or a file of ``unimoe export onnx``.
        images: pictures, films, folders of them, or patterns such as "photos/*.jpg".
        prompt: what to look for, separated by commas.
        threshold: lowest score, from 0 to 1.
        top: most detections of a picture for each 256 tokens of the prompt.
        rate: frames of a film to look at per second (default: all).
        json: print one JSON object instead of lines.
        draw: folder for copies of the pictures with the boxes drawn in.
    """
    names = split_prompt(prompt)
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold is {threshold}, expected a number from 0 to 1")
    if top < 1:
        raise UserError(f"--top is {top}, expected at least 1")
    if rate is not None and rate <= 0:
        raise UserError(f"--rate is {rate}, expected a positive number")
    files = find_inputs(images)
    kind = OnnxDetector if Path(model).suffix == ".onnx" else Detector
    detector = kind.load(model, names)
    answers = []
    for name, picture in iter_images(files, rate):
        (found,) = detector([picture], threshold, top)
        boxes, labels = found.boxes_K4.tolist(), found.labels_K.tolist()
        rows = [
            {"label": names[label], "label_id": label, "score": score, "box": box}
            for box, score, label in zip(boxes, found.scores_K.tolist(), labels, strict=True)
        ]
        answers.append({"image": name, "width": picture.width, "height": picture.height, "detections": rows})
        if not json:
            print(f"{name}: {len(rows)} found", flush=True)
            for row in rows:
                corners = ", ".join(f"{value:.0f}" for value in row["box"])
                print(f"  {row['score']:.2f}  {row['label']}  ({corners})", flush=True)
        if draw:
            place = Path(draw) / f"{_flat(name)}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            texts = [f"{row['label']} {row['score']:.2f}" for row in rows]
            draw_boxes(picture, boxes, labels, texts).save(place, quality=92)
    if json:
        print(json_format.dumps({"model": model, "names": names, "images": answers}, indent=1))
