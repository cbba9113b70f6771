"""Batches for training and for evaluation.

Shapes: B images, H x W pixels of the largest, M objects of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from .dataset import DetectionSample, DetectionSet
from .output import Target
from .prompt import Prompt, PromptBatch
from .sampling import PromptSampler
from .transforms import Augment, Resize, padded, picture_masks

_SIDES = {"left", "right"}


@dataclass
class ImageBatch:
    """Pictures padded at the right and below to the largest."""

    pixel_values: Tensor
    """[B, 3, H, W]"""
    pixel_mask: Tensor
    """[B, H, W] int64, 1 on the picture."""
    sizes: list[tuple[int, int]]
    """(width, height) of each picture as its boxes mean it, before resizing."""
    samples: list[DetectionSample]

    @classmethod
    def stack(
        cls, pixels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], samples: Sequence[DetectionSample]
    ) -> "ImageBatch":
        height, width = (max(picture.shape[side] for picture in pixels) for side in (1, 2))
        values = torch.stack([padded(picture, height, width) for picture in pixels])
        mask = picture_masks([picture.shape[1:] for picture in pixels], height, width)
        return cls(values, mask, list(sizes), list(samples))


@dataclass
class View:
    """A picture as the model sees it."""

    pixels: Tensor
    """[3, height, width]"""
    boxes_K4: Tensor
    """(x1, y1, x2, y2) of its objects, in its pixels."""
    kept_K: Tensor
    """int64, which of the sample's single objects they are."""


@dataclass
class TrainingBatch:
    """Pictures, what each is asked, and the answers."""

    images: ImageBatch
    prompts: list[Prompt]
    prompt_batch: PromptBatch
    targets: list[Target]


class TrainingData(Dataset):
    """Augmented pictures, each with a prompt drawn for it: (pixels [3, H, W], prompt, target, sample).

    Crowds are not trained on, and their classes are not asked for as absent. Captions are taken as they are.
    """

    def __init__(self, data: DetectionSet, augment: Augment, sampler: PromptSampler):
        self.data, self.augment, self.sampler = data, augment, sampler

    def __len__(self) -> int:
        return len(self.data.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Prompt, Target, DetectionSample]:
        sample = self.data.samples[index]
        view = self.view(sample)
        return view.pixels, *self.ask(sample, view.boxes_K4, view.kept_K, view.pixels.shape[1:]), sample

    def view(self, sample: DetectionSample) -> View:
        """The picture and the boxes of its single objects, augmented."""
        sided = sample.caption is not None and bool(_SIDES & set(sample.caption.lower().split()))
        return View(*self.augment(sample.load(), sample.boxes_M4[~sample.crowd_M], flip=not sided))

    def ask(
        self, sample: DetectionSample, boxes_K4: Tensor, kept_K: Tensor, size: Sequence[int]
    ) -> tuple[Prompt, Target]:
        """A prompt for a view of the given (height, width), and the answer."""
        category_K = sample.category_M[~sample.crowd_M][kept_K]
        if sample.caption is None:
            crowds = sample.category_M[sample.crowd_M].tolist()
            prompt, names_K = self.sampler(category_K, sample.negatives, crowds)
        else:
            prompt = Prompt.from_caption(sample.caption, sample.spans, self.sampler.tokenizer)
            names_K = category_K.masked_fill(~prompt.name_tokens.any(dim=1)[category_K], -1)  # cut off
        height, width = size
        scaled_K4 = box_convert(boxes_K4, "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        return prompt, Target(scaled_K4[names_K >= 0], names_K[names_K >= 0])

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, Prompt, Target, DetectionSample]]) -> TrainingBatch:
        pixels, prompts, targets, samples = zip(*items, strict=True)
        sizes = [(picture.shape[2], picture.shape[1]) for picture in pixels]
        return TrainingBatch(
            ImageBatch.stack(pixels, sizes, samples), list(prompts), PromptBatch.stack(prompts), list(targets)
        )


class EvaluationData(Dataset):
    """Whole pictures: (pixels [3, H, W], (width, height), sample)."""

    def __init__(self, data: DetectionSet, resize: Resize):
        self.data, self.resize = data, resize

    def __len__(self) -> int:
        return len(self.data.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, tuple[int, int], DetectionSample]:
        sample = self.data.samples[index]
        picture = sample.load()
        return self.resize(picture), picture.size, sample

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, tuple[int, int], DetectionSample]]) -> ImageBatch:
        return ImageBatch.stack(*zip(*items, strict=True))
