"""Datasets of training views and of whole images, and how they are collated.

Shapes: B images, H x W pixels of the largest, M objects of an image, K of them left in a view.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import box_convert

from unimoe.detection.model.output import Target
from unimoe.detection.model.prompt import Prompt, PromptBatch
from unimoe.errors import UserError

from .annotations import DetectionSample, DetectionSet
from .batches import EvalBatch, TrainBatch
from .sampling import PromptSampler
from .transforms import Augment, Resize, padded, pixel_masks_of

logger = logging.getLogger(__name__)

_SIDES = {"left", "right"}


@dataclass
class View:
    """An image as the model sees it."""

    pixels: Tensor
    """[3, height, width]"""
    boxes_K4: Tensor
    """(x1, y1, x2, y2) of its objects, in its pixels."""
    kept_K: Tensor
    """int64, which of the sample's single objects they are."""


class TrainDataset(Dataset):
    """Augmented images with a prompt drawn for each: (index, seed) -> (pixels [3, H, W], prompt, target).

    Crowds are not trained on, and their classes are not asked for as absent. Captions are taken as they are.
    """

    def __init__(self, data: DetectionSet, augment: Augment, sampler: PromptSampler):
        self.data, self.augment, self.sampler = data, augment, sampler

    def __len__(self) -> int:
        return len(self.data.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Prompt, Target]:
        index, seed = key
        sample = self.data.samples[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            view = self.view(sample)
            return view.pixels, *self.ask(sample, view.boxes_K4, view.kept_K, view.pixels.shape[1:])

    def view(self, sample: DetectionSample) -> View:
        """The image and the boxes of its single objects, augmented."""
        sided = sample.caption is not None and bool(_SIDES & set(sample.caption.lower().split()))
        return View(*self.augment(sample.load(), sample.boxes_M4[~sample.crowd_M], flip=not sided))

    def ask(
        self, sample: DetectionSample, boxes_K4: Tensor, kept_K: Tensor, size: Sequence[int]
    ) -> tuple[Prompt, Target]:
        """A prompt for a view of the given (height, width), and the objects it should find."""
        category_M = sample.category_M[~sample.crowd_M]
        category_K = category_M[kept_K]
        if sample.caption is None:
            crowds = sample.category_M[sample.crowd_M].tolist()
            prompt, names_K = self.sampler(category_K, sample.negatives, crowds, category_M.tolist())
        else:
            prompt = Prompt.from_caption(sample.caption, sample.spans, self.sampler.tokenizer)
            names_K = category_K.masked_fill(~prompt.name_tokens.any(dim=1)[category_K], -1)  # cut off
        height, width = size
        scaled_K4 = box_convert(boxes_K4, "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
        return prompt, Target(scaled_K4[names_K >= 0], names_K[names_K >= 0])

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, Prompt, Target]]) -> TrainBatch:
        pixels, prompts, targets = zip(*items, strict=True)
        values, mask = stack(pixels)
        return TrainBatch(mask, list(prompts), PromptBatch.stack(prompts), list(targets), pixel_values=values)


EvalItem = tuple[int, Tensor, tuple[int, int]]
"""(row of the set's samples, pixels [3, H, W], (width, height))"""


class EvalDataset(Dataset):
    """Whole images of a set."""

    def __init__(self, data: DetectionSet, resize: Resize, skip_unreadable: bool = False):
        """
        Args:
            data: the set.
            resize: as the model wants its images.
            skip_unreadable: log an image that cannot be read and give None for it, instead of raising.
        """
        self.data, self.resize, self.skip_unreadable = data, resize, skip_unreadable

    def __len__(self) -> int:
        return len(self.data.samples)

    def __getitem__(self, index: int) -> EvalItem | None:
        try:
            image = self.data.samples[index].load()
        except UserError as error:
            if not self.skip_unreadable:
                raise
            logger.error("%s", error)
            return None
        return index, self.resize(image), image.size

    def collate(self, items: Sequence[EvalItem | None]) -> EvalBatch:
        """A batch of the images that could be read, perhaps of none."""
        read = [item for item in items if item is not None]
        if not read:
            return EvalBatch([], [], None)
        rows, pixels, sizes = zip(*read, strict=True)
        values, mask = stack(pixels, self.resize.square)
        return EvalBatch(list(rows), list(sizes), mask, pixel_values=values)


def stack(pixels: Sequence[Tensor], side: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Images [3, h, w] padded at the right and below to a square of ``side`` (None: to the largest), and
    their mask [B, H, W] int64, 1 on the images; None where nothing is padded."""
    height, width = (side or max(image.shape[axis] for image in pixels) for axis in (1, 2))
    sizes = [tuple(image.shape[1:]) for image in pixels]
    values = torch.stack([padded(image, height, width) for image in pixels])
    return values, None if set(sizes) == {(height, width)} else pixel_masks_of(sizes, height, width)
