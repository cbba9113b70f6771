"""Images with labels: emoji of prepared artists, or ImageNet latents as DiT and SiT write them.

Shapes: B images, C channels, S side.
"""

import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimoe.errors import UserError
from unimoe.prepare import default_part
from unimoe.synthetic.sprites import Artist, open_artist
from unimoe.training.application import HELD_OUT, ApplicationData, split_of

from .text import embed_texts

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

    index: Tensor
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
    """Of each image, such as ``red apple``."""
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


class LatentFolder:
    """Files ``features/N.npy`` [1, C, S, S] and ``labels/N.npy`` [1] of one split."""

    def __init__(self, features: list[Path], labels: np.ndarray):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        images = np.stack([_latent(self.features[index]) for index in indices]).astype(np.float32)
        return Batch(torch.tensor(indices), torch.from_numpy(images), torch.from_numpy(self.labels[indices]))


class DiffusionData(ApplicationData):
    """Images and classes, split into training, validation and test."""

    def __init__(
        self,
        train: str = "sprites",
        side: int = 32,
        condition: Literal["class", "text"] = "class",
        steps: int = 1500,
        batch_size: int = 64,
        seed: int = 0,
    ):
        """
        Args:
            train: ``sprites``, the emoji of the prepared artists in ten classes; or a folder of latents,
                ``features/N.npy`` and ``labels/N.npy`` as DiT and SiT write them.
            side: height and width that sprites are drawn in.
            condition: ``class``, or ``text``: the Unicode names of sprites, by the prepared text encoder.
            steps: optimizer steps; the data is repeated as often as that takes.
            batch_size: images of a batch on each device.
            seed: of the order of the images.

        Raises:
            UserError: a number is below 1, or latents are to have texts.
        """
        super().__init__(steps, batch_size, seed)
        if condition == "text" and train != "sprites":
            raise UserError("data.condition is text, which only sprites have; latents have classes")
        self.train, self.side, self.condition = train, side, condition
        self.classes: list[str] = []
        """Names of the labels, after ``setup``."""
        self.shape: tuple[int, int] = (0, 0)
        """Channels and side, after ``setup``."""
        self.text = 0
        """Size of the embeddings of texts, after ``setup``; 0 for classes."""

    def files(self) -> list[str]:
        """None: latents are too many to be read for a hash, and parts have versions."""
        return []

    def setup(self, stage: Literal["fit", "validate", "test"] | str) -> None:
        """Draw the sprites or list the latents.

        Raises:
            UserError: a folder or a file is missing or bad, or there are too few images.
        """
        if self.sets:
            return
        if self.train == "sprites":
            artists = [open_artist(default_part(name)) for name in ("sprites", "artist")]
            self.classes, self.shape = list(CLASSES), (3, self.side)
            sprites = draw_sprites(artists, self.side)
            if self.condition == "text":
                names = sorted({name for one in sprites.values() for name in one.names})
                known = dict(zip(names, embed_texts(names), strict=True))
                self.text = len(known[names[0]])
                sprites = {
                    split: replace(one, texts=torch.stack([known[name] for name in one.names]))
                    for split, one in sprites.items()
                }
            self.sets = {**sprites}
        else:
            self.sets, classes = read_latents(Path(self.train))
            self.classes = [str(label) for label in range(classes)]
            first = self.sets["train"].__getitems__([0]).images
            self.shape = (first.shape[1], first.shape[2])


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
    canvas = Image.new("RGBA", (max(sprite.size),) * 2, "white")
    corner = tuple((max(sprite.size) - length) // 2 for length in sprite.size)
    canvas.alpha_composite(sprite, corner)  # type: ignore[arg-type]
    small = canvas.convert("RGB").resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def read_latents(folder: Path) -> tuple[dict[str, LatentFolder], int]:
    """The files of each split, and the number of classes.

    Raises:
        UserError: a folder is missing, a feature has no label or another shape, or the labels are not all
            of 0 to the largest.
    """
    for name in ("features", "labels"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder} has no folder {name}/, expected features/N.npy and labels/N.npy")
    features = sorted((folder / "features").glob("*.npy"), key=lambda path: (len(path.stem), path.stem))
    if len(features) < 3 * HELD_OUT:
        raise UserError(f"{folder}/features holds {len(features)} files, expected at least {3 * HELD_OUT}")
    labels, shape = [], _latent(features[0]).shape
    for path in features:
        if (found := _latent(path, "r").shape) != shape:
            raise UserError(f"{path} is {list(found)}, expected {list(shape)} as {features[0].name}")
        label = folder / "labels" / path.name
        if not label.is_file():
            raise UserError(f"{label} is missing, the label of {path}")
        labels.append(int(_load(label).reshape(-1)[0]))
    numbers = np.array(labels)
    for expected, found in enumerate(np.unique(numbers).tolist()):
        if found != expected:
            raise UserError(
                f"{folder}/labels holds class {found}, expected {expected}: all numbers from 0 on"
            )
    sets = {}
    for split in ("train", "val", "test"):
        chosen = [place for place in range(len(features)) if split_of(place) == split]
        if not chosen:
            raise UserError(f"{folder}: the {split} split of {len(features)} latents is empty")
        sets[split] = LatentFolder([features[place] for place in chosen], numbers[chosen])
    return sets, int(numbers.max()) + 1


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


def _latent(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """[C, S, S], with ``mmap_mode`` not read yet. Raises UserError for another shape."""
    found = _load(path, mmap_mode)
    latent = found[0] if found.ndim == 4 and len(found) == 1 else found
    if latent.ndim != 3 or latent.shape[1] != latent.shape[2]:
        raise UserError(f"{path} is {list(found.shape)}, expected [1, channels, side, side]")
    return latent
