"""Pictures and boxes on their way into the model: augmentation for training, resizing for everything else.

Shapes: M objects of an image, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

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
    """Share of the pictures that are mirrored."""
    crop: float = 0.5
    """Share of the pictures of which a random part is taken first."""
    crop_sizes: Sequence[int] = (400, 500, 600)
    """Short sides to draw from before cropping."""
    crop_range: tuple[int, int] = (384, 600)
    """Sides of the part, from and to, as far as the picture goes."""
    colour: float = 0.0
    """Greatest change of brightness, contrast and saturation, as a share; a tenth of it for the hue."""


class Augment:
    """A random view of a picture and its boxes. Draws from torch's global generator."""

    def __init__(
        self,
        config: AugmentConfig | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.config = config or AugmentConfig()
        self.normalise = Normalise(mean, std)
        strength = self.config.colour
        self.colour = v2.ColorJitter(strength, strength, strength, strength / 10)

    def __call__(
        self, picture: Image.Image, boxes_M4: Tensor, flip: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(pixels [3, H, W], boxes [K, 4], kept [K] int64: the rows of ``boxes_M4`` that are still there).

        Boxes are (x1, y1, x2, y2) in pixels of the picture, then of the view. ``flip`` False never mirrors,
        for pictures whose text speaks of left and right.
        """
        config = self.config
        boxes = tv_tensors.BoundingBoxes(boxes_M4, format="XYXY", canvas_size=(picture.height, picture.width))
        if flip and torch.rand(()) < config.flip:
            picture, boxes = F.horizontal_flip(picture), F.horizontal_flip(boxes)
        if torch.rand(()) < config.crop:
            picture, boxes = self._resize(picture, boxes, config.crop_sizes)
            picture, boxes = self._crop(picture, boxes)
        picture, boxes = self._resize(picture, boxes, config.sizes)
        if config.colour:
            picture = self.colour(picture)
        boxes_M4 = F.clamp_bounding_boxes(boxes).as_subclass(Tensor)
        kept = (boxes_M4[:, 2:] - boxes_M4[:, :2] >= 1).all(dim=1).nonzero()[:, 0]
        return self.normalise(picture), boxes_M4[kept], kept

    def _resize(self, picture, boxes, sizes: Sequence[int]):
        short = sizes[int(torch.randint(len(sizes), ()))]
        size = fitted(picture.width, picture.height, short, self.config.longest)
        return F.resize(picture, size, antialias=True), F.resize(boxes, size)

    def _crop(self, picture, boxes):
        low, high = self.config.crop_range

        def part(side: int) -> tuple[int, int]:
            length = int(torch.randint(min(low, side), min(high, side) + 1, ()))
            return int(torch.randint(side - length + 1, ())), length

        (top, height), (left, width) = part(picture.height), part(picture.width)
        area = (top, left, height, width)
        return F.crop(picture, *area), F.crop(boxes, *area)


class Resize:
    """The whole picture, short side ``size`` as long as the long side is at most ``longest``."""

    def __init__(
        self,
        size: int = 800,
        longest: int = 1333,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.size, self.longest = size, longest
        self.normalise = Normalise(mean, std)

    def __call__(self, picture: Image.Image) -> Tensor:
        """[3, H, W]"""
        size = fitted(picture.width, picture.height, self.size, self.longest)
        return self.normalise(F.resize(picture, size, antialias=True))


class Normalise(v2.Compose):
    """A picture to float32 [3, H, W] with ``mean`` and ``std`` taken out."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
        )


def fitted(width: int, height: int, short: int, longest: int) -> list[int]:
    """[height, width] of the same shape with the short side ``short``, or the long side ``longest`` if that
    is smaller."""
    scale = min(short / min(width, height), longest / max(width, height))
    return [max(1, round(height * scale)), max(1, round(width * scale))]
