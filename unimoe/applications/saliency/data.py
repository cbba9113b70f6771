"""Images with sets of plausible masks: generated scenes, or a folder.

Shapes: B images, G plausible masks, C candidate masks, S side.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimoe.applications.pictures import IMAGE_TYPES, image_size, read_image
from unimoe.applications.tables import read_columns
from unimoe.errors import UserError
from unimoe.synthetic.salient_scenes import Example, draw_scenes, with_candidates
from unimoe.training.application import ApplicationData, split_of

SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""Splits that a verb needs."""
SCENES = {"images": 1500, "test_images": 200}
"""How many are generated where the settings leave it open."""


class Batch(NamedTuple):
    """B images."""

    index: Tensor  # type: ignore[override]  (tuple.index)
    """[B] their numbers in the split."""
    images: Tensor
    """[B, 3, S, S] float in -1..1."""
    masks: Tensor
    """[B, G, S, S] float, 0 or 1: plausible masks, behind those of an image zeros."""
    preferences: Tensor
    """[B, G] float in 0..1, of each plausible mask; zeros behind."""
    count: Tensor  # type: ignore[override]  (tuple.count)
    """[B] int64, plausible masks of each image."""
    candidates: Tensor
    """[B, C, S, S] float, 0 or 1."""
    scores: Tensor
    """[B, C] float in 0..1, the preference for each candidate."""


class Examples:
    """Images of one split, read one by one."""

    def __init__(self, count: int, read: Callable[[int], Example]):
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> Batch:
        found = [self.read(index) for index in indices]
        count = torch.tensor([len(one.masks) for one in found])
        shape = len(found), int(count.max()), *found[0].masks.shape[1:]
        masks, preferences = torch.zeros(shape), torch.zeros(shape[:2])
        for row, one in enumerate(found):
            masks[row, : len(one.masks)] = torch.from_numpy(one.masks)
            preferences[row, : len(one.masks)] = torch.from_numpy(one.preferences)
        images, candidates, scores = (
            torch.from_numpy(np.stack([getattr(one, name) for one in found])).float()
            for name in ("image", "candidates", "scores")
        )
        return Batch(torch.tensor(indices), images / 127.5 - 1, masks, preferences, count, candidates, scores)


class SaliencyData(ApplicationData):
    """Images and their plausible masks, split into training, validation and test."""

    def __init__(
        self,
        train: str = "scenes",
        side: int = 64,
        images: int | None = None,
        test_images: int | None = None,
        steps: int = 600,
        batch_size: int = 16,
        seed: int = 0,
    ):
        """
        Args:
            train: ``scenes``, generated from the prepared emoji and photos; or a folder with
                ``images/NAME.jpg`` (or .png, .webp, .bmp), ``masks/NAME.png`` or several in ``masks/NAME/``,
                and perhaps ``preferences.csv`` with the columns ``mask`` (such as ``NAME/1.png``) and
                ``score`` (0..1).
            side: height and width of the images, a multiple of 8; those of a folder are resized.
            images: scenes for training, by default 1500.
            test_images: scenes for the test, and for validation; by default 200.
            steps: optimizer steps; the data is repeated as often as that takes.
            batch_size: images of a batch on each device.
            seed: seed of the order of the images.

        Raises:
            UserError: a number is out of range, or one of scenes is given for a folder.
        """
        super().__init__(steps, batch_size, seed)
        smallest = 64 if train == "scenes" else 8
        if side % 8 or side < smallest:
            raise UserError(f"data.side is {side}, expected a multiple of 8, at least {smallest}")
        counts = dict(SCENES)
        for name, given in (("images", images), ("test_images", test_images)):
            if given is not None and train != "scenes":
                raise UserError(f"data.{name} is {given}, which only scenes have, but data.train is {train}")
            if given is not None and given < 1:
                raise UserError(f"data.{name} is {given}, expected at least 1")
            counts[name] = counts[name] if given is None else given
        self.train, self.side = train, side
        self.images = {"train": counts["images"], "val": counts["test_images"], "test": counts["test_images"]}

    def files(self) -> list[str]:
        """None: a folder's images are too many to be read for a hash, and parts have versions."""
        return []

    def setup(self, stage: str) -> None:
        """Draw the scenes or list the folder, of the splits that ``stage`` needs.

        Raises:
            UserError: a folder, an image or a mask is missing or bad, or a split is empty.
        """
        wanted = [split for split in SPLITS[stage] if split not in self.sets]
        if self.train == "scenes":
            for split in wanted:
                scenes = draw_scenes(split, self.images[split], self.side)
                self.sets[split] = Examples(len(scenes), scenes.__getitem__)
        elif wanted:
            folder = SaliencyFolder(Path(self.train), self.side)
            self.sets |= {split: folder.examples(split) for split in wanted}


class SaliencyFolder:
    """Images, masks and preferences in files, as :class:`SaliencyData` says."""

    def __init__(self, folder: Path, side: int):
        """
        Raises:
            UserError: what is in the folder is not as it should be.
        """
        self.folder, self.side = folder, side
        for name in ("images", "masks"):
            if not (folder / name).is_dir():
                raise UserError(f"{folder} has no folder {name}/, expected images/ and masks/")
        self.masks = {
            image: self._masks_of(image)
            for image in sorted((folder / "images").iterdir())
            if image.suffix.lower() in IMAGE_TYPES
        }
        self.preferences: dict[str, float] = {}
        table = folder / "preferences.csv"
        if table.is_file():
            columns = read_columns([table], ["mask", "score"])
            names, scores = columns["mask"], columns["score"].numbers()
            self.preferences = {
                names.values[code]: score for code, score in zip(names.codes, scores.tolist(), strict=True)
            }
            for mask in (mask for masks in self.masks.values() for mask in masks):
                score = self.preferences.get(self._name(mask))
                if score is None or not 0 <= score <= 1:
                    found = "no score" if score is None else f"the score {score}"
                    raise UserError(f"{table}: {self._name(mask)} has {found}, expected one in 0..1")

    def examples(self, split: str) -> Examples:
        """The images of a split. Raises UserError if there are none."""
        images = list(self.masks)
        chosen = [image for image in images if split_of(image.stem) == split]
        if not chosen:
            raise UserError(f"{self.folder}: the {split} split of {len(images)} images is empty")
        return Examples(len(chosen), lambda index: self.read(chosen[index]))

    def read(self, image: Path) -> Example:
        """One image, resized."""
        pixels = np.asarray(_resized(image, "RGB", self.side)).transpose(2, 0, 1)
        greys = np.stack([np.asarray(_resized(mask, "L", self.side)) for mask in self.masks[image]])
        masks = greys >= np.clip(greys.max(axis=(1, 2), keepdims=True), 1, 128)  # keeps what is small
        preferences = [self.preferences.get(self._name(mask), 1.0) for mask in self.masks[image]]
        rng = random.Random(f"saliency:{image.stem}")
        return with_candidates(pixels, masks, np.array(preferences, dtype=np.float32), rng)

    def _name(self, mask: Path) -> str:
        return mask.relative_to(self.folder / "masks").as_posix()

    def _masks_of(self, image: Path) -> list[Path]:
        one, several = self.folder / "masks" / f"{image.stem}.png", self.folder / "masks" / image.stem
        if one.is_file() and several.is_dir():
            raise UserError(f"{image} has masks in {one} and in {several}/, expected one of these")
        masks = [one] if one.is_file() else sorted(several.glob("*.png"))
        if not masks:
            raise UserError(f"{image} has no mask, expected {one} or files in {several}/")
        width, height = image_size(image)
        for mask in masks:
            grey = read_image(mask, "L")
            if grey.size != (width, height):
                raise UserError(
                    f"{mask} has {grey.width} x {grey.height} pixels, expected {width} x {height} as "
                    f"{image.name}"
                )
            if grey.getextrema()[1] < 128:  # type: ignore[operator]
                raise UserError(f"{mask} is black, expected an object in white")
        return masks


def _resized(path: Path, mode: str, side: int) -> Image.Image:
    return read_image(path, mode).resize((side, side), Image.Resampling.BOX)
