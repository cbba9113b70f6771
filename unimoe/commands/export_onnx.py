"""``unimoe export onnx``: a detector as one file that runs without torch."""

import logging

from unimoe.detection.data.transforms import padded, resize_for
from unimoe.detection.inference.onnx import export_onnx
from unimoe.detection.inference.sources import find_inputs, split_prompt
from unimoe.detection.model.loading import load_detector
from unimoe.media.image import load_image

log = logging.getLogger(__name__)


def onnx(model: str, path: str, *, prompt: str, images: list[str] | None = None) -> None:
    """Write a detector for a fixed list of names as an ONNX file, and compare it with the model.

    Args:
        model: folder of ``unimoe fit``.
        path: where to write, a name that ends with .onnx.
        prompt: what the file will look for, separated by commas.
        images: pictures to compare on (default: random numbers).
    """
    detector, tokenizer = load_detector(model)
    resize = resize_for(detector.config)
    side = resize.longest
    pictures = [
        padded(resize(load_image({"type": "image", "path": str(file)}, str(file))), side, side)
        for file in (find_inputs(images) if images else [])
    ]
    worst = export_onnx(detector, tokenizer, split_prompt(prompt), path, pictures)
    log.info("wrote %s; it differs from the model by at most %.1e", path, worst)
