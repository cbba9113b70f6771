"""Augmentation of images and boxes for training, resizing for everything else.

Shapes: M objects of an image, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import clip_boxes_to_image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from unimoe.detection.model.configuration import DynamicDinoConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class AugmentConfig:
    """DETR's augmentation with the sizes of Grounding DINO."""

    sizes: Sequence[int] = tuple(range(480, 801, 32))
    """Short sides to draw from, in pixels."""
    longest: int = 1333
    """The long side is at most this, whatever the short side then is."""
    flip: float = 0.5
    """Share of the images that are mirrored."""
    crop: float = 0.5
    """Share of the images of which a random part is taken first."""
    crop_sizes: Sequence[int] = (400, 500, 600)
    """Short sides to draw from before cropping."""
    crop_range: tuple[int, int] = (384, 600)
    """Sides of the part, from and to, as far as the image reaches."""
    colour: float = 0.0
    """Greatest change of brightness, contrast and saturation, as a share; a tenth of it for the hue."""


class Augment:
    """A random view of an image and its boxes. Draws from torch's global generator."""

    def __init__(
        self,
        config: AugmentConfig | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.config = config or AugmentConfig()
        self.normalize = Normalize(mean, std)
        strength = self.config.colour
        self.color_jitter = v2.ColorJitter(strength, strength, strength, strength / 10)

    def __call__(
        self, image: Image.Image, boxes_M4: Tensor, flip: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels [3, H, W], boxes [K, 4], kept [K] int64: the rows of ``boxes_M4`` that are still there).

        Boxes are (x1, y1, x2, y2) in pixels of the image, then of the view. ``flip`` False never mirrors,
        for images whose text speaks of left and right.
        """
        config, width, image_3HW = self.config, image.width, F.to_image(image)
        boxes_M4 = boxes_M4.clone()
        if flip and torch.rand(()) < config.flip:
            image_3HW = F.horizontal_flip(image_3HW)
            boxes_M4[:, [0, 2]] = width - boxes_M4[:, [2, 0]]
        if torch.rand(()) < config.crop:
            image_3HW, boxes_M4 = self._crop(*self._resize(image_3HW, boxes_M4, config.crop_sizes))
        image_3HW, boxes_M4 = self._resize(image_3HW, boxes_M4, config.sizes)
        if config.colour:
            image_3HW = self.color_jitter(image_3HW)
        boxes_M4 = clip_boxes_to_image(boxes_M4, (image_3HW.shape[1], image_3HW.shape[2]))
        kept = (boxes_M4[:, 2:] - boxes_M4[:, :2] >= 1).all(dim=1).nonzero()[:, 0]
        return self.normalize(image_3HW), boxes_M4[kept], kept

    def _resize(self, image: Tensor, boxes_M4: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        _, height, width = image.shape
        size = fit_size(width, height, sizes[int(torch.randint(len(sizes), ()))], self.config.longest)
        scale = boxes_M4.new_tensor([size[1] / width, size[0] / height] * 2)
        return F.resize(image, size, antialias=True), boxes_M4 * scale

    def _crop(self, image: Tensor, boxes_M4: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.config.crop_range

        def part(side: int) -> tuple[int, int]:
            length = int(torch.randint(min(low, side), min(high, side) + 1, ()))
            return int(torch.randint(side - length + 1, ())), length

        (top, height), (left, width) = part(image.shape[1]), part(image.shape[2])
        return F.crop(image, top, left, height, width), boxes_M4 - boxes_M4.new_tensor([left, top] * 2)


class Resize:
    """The whole image, short side ``size`` as long as the long side is at most ``longest``."""

    def __init__(
        self,
        size: int = 800,
        longest: int = 1333,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.size, self.longest = size, longest
        self.square = longest if size == longest else None
        """Side of the square that an image is padded to, whatever its shape; None where there is none."""
        self.normalize = Normalize(mean, std)

    def __call__(self, image: Image.Image) -> Tensor:
        """[3, H, W]"""
        size = fit_size(image.width, image.height, self.size, self.longest)
        return self.normalize(F.resize(F.to_image(image), size, antialias=True))


def resize_for(config: DynamicDinoConfig) -> Resize:
    """How a model of this configuration wants its images."""
    size = config.image_size
    shorter, longest = (size, size) if isinstance(size, int) else size
    return Resize(shorter, longest, config.image_mean or IMAGENET_MEAN, config.image_std or IMAGENET_STD)


class Normalize(v2.Compose):
    """8-bit pixels to float32, with ``mean`` and ``std`` taken out."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__(
            [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]
        )


def fit_size(width: int, height: int, short: int, longest: int) -> list[int]:
    """[height, width] of the same shape with the short side ``short``, or the long side ``longest`` if that
    is smaller."""
    scale = min(short / min(width, height), longest / max(width, height))
    return [max(1, round(height * scale)), max(1, round(width * scale))]


def padded(pixels: Tensor, height: int, width: int) -> Tensor:
    """[3, h, w] with zeros at the right and below, up to [3, height, width]."""
    return F.pad(pixels, [0, 0, width - pixels.shape[2], height - pixels.shape[1]])


def pixel_masks_of(sizes: Sequence[Sequence[int]], height: int, width: int) -> Tensor:
    """[B, height, width] int64, 1 on images of (height, width) ``sizes`` and 0 on their padding."""
    masks = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for mask, (rows, columns) in zip(masks, sizes, strict=True):
        mask[:rows, :columns] = 1
    return masks
