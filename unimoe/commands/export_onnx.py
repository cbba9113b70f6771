"""``unimoe export onnx``: a detector as one file that runs without torch."""

import logging

from transformers.utils.logging import disable_progress_bar

from unimoe.detection.inference.onnx import export_onnx
from unimoe.detection.inference.sources import asked_names, find_inputs
from unimoe.detection.model.loading import load_detector
from unimoe.media.image import load_image

log = logging.getLogger(__name__)


def onnx(
    model: str,
    path: str,
    *,
    prompt: str | None = None,
    names: str | None = None,
    images: list[str] | None = None,
) -> None:
    """Write a detector for a fixed list of names as an ONNX file, and compare it with the model.

    Args:
        model: folder of ``unimoe fit``.
        path: where to write, a name that ends with .onnx.
        prompt: what the file will look for: "cat, red car".
        names: file with what to look for, one name a line.
        images: images to compare on (default: random numbers).
    """
    labels, _ = asked_names(prompt, names)
    disable_progress_bar()  # transformers' own
    detector, tokenizer = load_detector(model)
    loaded = [
        load_image({"type": "image", "path": str(file)}, str(file))
        for file in (find_inputs(images) if images else [])
    ]
    worst = export_onnx(detector, tokenizer, labels, path, loaded)
    log.info("wrote %s; it differs from the model by at most %.1e", path, worst)
