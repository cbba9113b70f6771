"""Batches of images: with a prompt and targets for training, or whole for evaluation.

Shapes: B images, S x S pixels, N levels of the backbone, C channels, h x w cells of a level.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from unimoe.detection.model.output import Target
from unimoe.detection.model.prompt import Prompt, PromptBatch


@dataclass
class TrainBatch:
    """What a training step needs: pixels, or the backbone's maps of them."""

    pixel_mask: Tensor | None
    """[B, S, S] int64; None where nothing is padded."""
    prompts: list[Prompt]
    prompt_batch: PromptBatch
    targets: list[Target]
    pixel_values: Tensor | None = None
    """[B, 3, S, S]"""
    image_features: list[Tensor] | None = None
    """N maps [B, C, h, w]."""

    def to(self, device: torch.device | str, **kwargs: Any) -> "TrainBatch":
        targets = [Target(one.boxes_M4.to(device), one.names_M.to(device)) for one in self.targets]
        return replace(_images_to(self, device), prompt_batch=self.prompt_batch.to(device), targets=targets)


@dataclass
class EvalBatch:
    """Images in which every name of their set is searched."""

    rows: list[int]
    """Indices of the set's samples."""
    sizes: list[tuple[int, int]]
    """(width, height) in the pixels of the annotations."""
    pixel_mask: Tensor | None
    """[B, S, S] int64; None where nothing is padded."""
    pixel_values: Tensor | None = None
    """[B, 3, S, S]"""
    image_features: list[Tensor] | None = None
    """N maps [B, C, h, w]."""

    def to(self, device: torch.device | str, **kwargs: Any) -> "EvalBatch":
        return _images_to(self, device)


AnyBatch = TypeVar("AnyBatch", TrainBatch, EvalBatch)


def _images_to(batch: AnyBatch, device: torch.device | str) -> AnyBatch:
    """The batch with its images on ``device``."""
    maps = batch.image_features
    return replace(
        batch,
        pixel_mask=None if batch.pixel_mask is None else batch.pixel_mask.to(device),
        pixel_values=None if batch.pixel_values is None else batch.pixel_values.to(device),
        image_features=None if maps is None else [level.to(device) for level in maps],
    )
