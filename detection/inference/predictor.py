"""A detector for use: pictures and a list of names in, boxes with labels from that list out."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from unimoe.detection.data.dataset import stack
from unimoe.detection.data.transforms import resize_for
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.text_cache import TextFeatureCache

from .detect import Detections, PromptChunks, detect


class Detector:
    """Looks for always the same names; their text features are computed once.

    >>> detector = Detector.load("runs/demo-detection/moe", ["cat", "red car"])
    >>> (found,) = detector([picture], threshold=0.3)
    >>> [detector.names[label] for label in found.labels_K]
    """

    def __init__(self, model: DynamicDinoForObjectDetection, tokenizer, names: Sequence[str]):
        self.model, self.names = model.eval(), list(names)
        self.chunks = PromptChunks.of(self.names, tokenizer, model.config.max_text_tokens)
        self.resize = resize_for(model.config)
        self.text = TextFeatureCache(model)

    @classmethod
    def load(cls, folder: str | Path, names: Sequence[str], device: str | None = None) -> "Detector":
        """From a folder of ``unimoe fit``; ``device`` None takes the GPU if there is one."""
        model, tokenizer = load_detector(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, names)  # type: ignore[arg-type]

    def __call__(
        self, pictures: Sequence[Image.Image], threshold: float = 0.3, top: int = 300
    ) -> list[Detections]:
        """What is in each RGB picture, best first; they are looked at one by one, whatever their sizes."""
        found = []
        for picture in pictures:
            pixels, mask = stack([self.resize(picture)], self.resize.square)
            mask = None if mask is None else mask.to(self.model.device)
            found += detect(
                self.model,
                self.chunks,
                pixels.to(self.model.device),
                mask,
                [picture.size],
                self.text,
                top=top,
                threshold=threshold,
            )
        return [_sorted(one) for one in found]


def _sorted(found: Detections) -> Detections:
    """Best first over all prompts."""
    order_K = found.scores_K.argsort(descending=True)
    return Detections(found.boxes_K4[order_K], found.scores_K[order_K], found.labels_K[order_K])
