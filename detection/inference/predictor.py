"""A detector for use: images and a list of names in, boxes with labels from that list out."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from unimoe.detection.data.dataset import stack
from unimoe.detection.data.transforms import resize_for
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.text_cache import TextFeatureCache

from .detect import Detections, PromptChunks, best_first, detect


class Detector:
    """Looks for one list of names in any number of images; their text features are computed once.

    >>> detector = Detector.load("runs/demo-detection/moe", ["cat", "red car"])
    >>> (found,) = detector([image], threshold=0.3)
    >>> [detector.names[label] for label in found.labels_K]
    """

    def __init__(
        self,
        model: DynamicDinoForObjectDetection,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
    ):
        self.model, self.names = model.eval(), list(names)
        self.prompts = PromptChunks.of(self.names, tokenizer, model.config.max_text_tokens)
        self.resize = resize_for(model.config)
        self.text = TextFeatureCache(model)

    @classmethod
    def load(cls, folder: str | Path, names: Sequence[str], device: str | None = None) -> "Detector":
        """Load a folder of ``unimoe fit``; ``device`` None takes the GPU if there is one.

        Raises:
            UserError: there is no detector, or its tokenizer does not know a name.
        """
        model, tokenizer = load_detector(folder)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, names)  # type: ignore[arg-type]

    def __call__(
        self,
        images: Sequence[Image.Image],
        threshold: float | Sequence[float] = 0.3,
        top: int = 300,
        one_label: bool = False,
        nms: float | None = None,
    ) -> list[Detections]:
        """What is in each RGB image, best first; images are searched one by one, whatever their sizes.

        Args:
            images: RGB.
            threshold: lowest score, or one for each name.
            top: most detections of an image for each prompt.
            one_label: give each box its best label only.
            nms: leave out a box that overlaps a better one of the same label (with ``one_label``: of any) by
                more than this IoU.
        """
        found = []
        for image in images:
            pixels, mask = stack([self.resize(image)], self.resize.square)
            mask = None if mask is None else mask.to(self.model.device)
            found += detect(
                self.model,
                self.prompts,
                pixels.to(self.model.device),
                mask,
                [image.size],
                self.text,
                top=top,
                threshold=threshold,
                one_label=one_label,
            )
        return [best_first(one, nms, one_label) for one in found]
