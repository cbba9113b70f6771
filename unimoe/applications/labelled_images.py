"""Images with classes; and emoji of several artists in ten of them.

Shapes: B images, C channels, S side.
"""

import unicodedata
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimoe.applications.pictures import scaled_pixels
from unimoe.synthetic.sprites import Artist
from unimoe.training.application import split_of

CLASSES: dict[str, list[tuple[int, int]]] = {
    "face": [(0x1F600, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F92F), (0x1F970, 0x1F97A)],
    "animal": [(0x1F400, 0x1F43C), (0x1F980, 0x1F9AE)],
    "food": [(0x1F345, 0x1F37F), (0x1F950, 0x1F96F)],
    "plant": [(0x1F331, 0x1F344), (0x1F490, 0x1F490)],
    "vehicle": [(0x1F680, 0x1F6A4), (0x1F6F4, 0x1F6FC)],
    "clock": [(0x1F550, 0x1F567)],
    "heart": [(0x1F493, 0x1F49F), (0x1F90D, 0x1F90E), (0x1F9E1, 0x1F9E1)],
    "moon": [(0x1F311, 0x1F31E)],
    "leisure": [(0x1F3A3, 0x1F3C0), (0x1F945, 0x1F94F)],
    "clothes": [(0x1F451, 0x1F462), (0x1F9E2, 0x1F9E6), (0x1F97B, 0x1F97F)],
}
"""Class of sprites -> ranges of code points, both ends included."""


class Batch(NamedTuple):
    """B images."""

    index: Tensor  # type: ignore[override]  (tuple.index)
    """[B] their numbers in the split."""
    images: Tensor
    """[B, C, S, S] float, about -1..1."""
    labels: Tensor
    """[B] int64 classes."""
    texts: Tensor | None = None
    """[B, X] embeddings of their names, where these are the condition."""


@dataclass(frozen=True)
class LabelledImages:
    """Images of one split."""

    images: np.ndarray
    """[N, C, S, S] float32; may be a memory map."""
    labels: np.ndarray
    """[N] int64."""
    names: list[str] = field(default_factory=list)
    """Name of each image, such as ``red apple``."""
    texts: Tensor | None = None
    """[N, X] embeddings of the names."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        images = torch.from_numpy(np.ascontiguousarray(self.images[indices], dtype=np.float32))
        texts = None if self.texts is None else self.texts[indices]
        return Batch(torch.tensor(indices), images, torch.from_numpy(self.labels[indices]), texts)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images and labels."""
        return torch.from_numpy(self.images), torch.from_numpy(self.labels)


def draw_sprites(artists: list[Artist], side: int) -> dict[str, LabelledImages]:
    """The emoji of ``CLASSES`` by each artist on white, in -1..1; all artists' drawings of one code point are
    in the same split."""
    rows: dict[str, list[tuple[np.ndarray, int, str]]] = {"train": [], "val": [], "test": []}
    for label, ranges in enumerate(CLASSES.values()):
        for number in (one for first, last in ranges for one in range(first, last + 1)):
            name = unicodedata.name(chr(number), "").lower()
            for artist in artists:
                sprite = artist.sprite(chr(number))
                if sprite is not None:
                    rows[split_of(number)].append((_on_white(sprite, side), label, name))
    sets = {}
    for split, found in rows.items():
        images, labels, names = zip(*found, strict=True)
        sets[split] = LabelledImages(np.stack(images), np.array(labels), list(names))
    return sets


def _on_white(sprite: Image.Image, side: int) -> np.ndarray:
    """[3, S, S] in -1..1, the sprite in the middle."""
    longest = max(sprite.size)
    canvas = Image.new("RGBA", (longest, longest), "white")
    canvas.alpha_composite(sprite, ((longest - sprite.width) // 2, (longest - sprite.height) // 2))
    return scaled_pixels(canvas.convert("RGB").resize((side, side), Image.Resampling.BOX))
