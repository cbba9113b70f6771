"""Images with labels: emoji of prepared artists, or ImageNet latents as DiT and SiT write them.

Shapes: B images, C channels, S side.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from unimoe.applications.labelled_images import CLASSES, Batch, draw_sprites
from unimoe.errors import UserError
from unimoe.prepare import default_part
from unimoe.synthetic.sprites import open_artist
from unimoe.training.application import ApplicationData, split_of

from .text import embed_texts


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
            seed: seed of the order of the images.

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
            sets, classes = read_latents(Path(self.train))
            self.sets = {**sets}
            self.classes = [str(label) for label in range(classes)]
            first = self.sets["train"].__getitems__([0]).images
            self.shape = (first.shape[1], first.shape[2])


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
    if not features:
        raise UserError(f"{folder}/features holds no files N.npy")
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
        chosen = [place for place, path in enumerate(features) if split_of(path.stem) == split]
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
