"""Images in bad and in clear weather: prepared photos with weather by formulas, or folders of pairs.

Shapes: B images, S side.
"""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimoe.applications.pictures import IMAGE_TYPES, image_size, read_image
from unimoe.errors import UserError
from unimoe.prepare import default_part
from unimoe.synthetic.sprites import background, load_photos, split_photos
from unimoe.synthetic.weather import WEATHERS
from unimoe.training.application import ApplicationData, split_of

VAL_PHOTOS = ("chelsea.png", "coins.png")
"""Photos, of those that are not of the test, that are for validation."""
EVALUATED = 120
"""Patches of each weather in the validation and the test of photos."""
HELD_OUT_SHARE = 0.1
"""Share of a folder's scenes for validation, and as much for the test, where the settings leave it open."""


class Batch(NamedTuple):
    """B images."""

    index: Tensor  # type: ignore[override]  (tuple.index)
    """[B] their numbers in the split."""
    degraded: Tensor
    """[B, 3, S, S] float in 0..1."""
    clear: Tensor
    """[B, 3, S, S] float in 0..1, the same scenes."""
    weathers: Tensor
    """[B] int64 their weathers, which no model sees."""


class WeatheredPhotos:
    """``count`` patches of photos in each weather in turn; a patch follows from its number and ``seed``."""

    def __init__(self, photos: list[Image.Image], count: int, side: int, seed: int):
        self.photos, self.count, self.side, self.seed = photos, count, side, seed

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: list[int]) -> Batch:
        return _batch(indices, [self._patch(index) for index in indices])

    def _patch(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        weather, rng = index % len(WEATHERS), random.Random(f"{self.seed}:{index}")
        clear = _pixels(background(rng.choice(self.photos), rng, self.side))
        degraded = list(WEATHERS.values())[weather](clear, np.random.default_rng(rng.getrandbits(64)))
        return np.round(degraded * 255) / 255, clear, weather


class Pair(NamedTuple):
    """Two files of one scene."""

    degraded: Path
    clear: Path
    scene: str
    """Path below the folder of the weather, without its suffix."""
    weather: int
    size: tuple[int, int]
    """Width and height."""


class PairedImages:
    """Patches of pairs of files: a random one of each pair, ``crops`` times; or all that do not overlap."""

    def __init__(self, pairs: list[Pair], side: int, crops: int = 0):
        self.pairs, self.side, self.crops = pairs, side, crops
        self.tiles = [
            (place, (left, top))
            for place, pair in enumerate(pairs)
            for top in range(0, pair.size[1] - side + 1, side)
            for left in range(0, pair.size[0] - side + 1, side)
        ]

    def __len__(self) -> int:
        return self.crops * len(self.pairs) if self.crops else len(self.tiles)

    def __getitems__(self, indices: list[int]) -> Batch:
        return _batch(indices, [self._patch(index) for index in indices])

    def _patch(self, index: int) -> tuple[np.ndarray, np.ndarray, int]:
        if self.crops:
            pair, rng = self.pairs[index % len(self.pairs)], random.Random(index)
            left, top = (rng.randint(0, length - self.side) for length in pair.size)
        else:
            place, (left, top) = self.tiles[index]
            pair = self.pairs[place]
        box = (left, top, left + self.side, top + self.side)
        return _read(pair.degraded, box), _read(pair.clear, box), pair.weather


class RestorationData(ApplicationData):
    """Square patches of images in bad and in clear weather."""

    def __init__(
        self,
        train: str = "photos",
        test: str | None = None,
        side: int = 64,
        patches: int = 6000,
        val_share: float | None = None,
        test_share: float | None = None,
        steps: int = 600,
        batch_size: int = 8,
        seed: int = 0,
    ):
        """
        Args:
            train: ``photos``, the prepared photos with rain, haze and snow by formulas (test and validation
                are other photos); or a folder with ``input/`` and ``gt/``, files of the same names and sizes.
                Folders in ``input/`` are weathers: ``input/rain/1.png`` and ``gt/rain/1.png``.
            test: such a folder for the test (default: a share of ``train``).
            side: height and width of a patch. Evaluation cuts an image in as many as it has.
            patches: different ones in training.
            val_share: expected share of a folder's scenes for validation, by default a tenth. A scene is in
                one split in all weathers: ``rain/1.png`` with ``haze/1.png``.
            test_share: the same for the test; not used with ``test``.
            steps: optimizer steps; the data is repeated as often as that takes.
            batch_size: patches of a batch on each device.
            seed: seed of the order of the patches.

        Raises:
            UserError: a number is out of range, or a share is given for photos.
        """
        super().__init__(steps, batch_size, seed)
        if side < 16 or patches < 1:
            raise UserError(f"data.side and data.patches are {side} and {patches}, expected 16 and 1 or more")
        for flag, given in (("val_share", val_share), ("test_share", test_share)):
            if train == "photos" and given is not None:
                raise UserError(f"data.{flag} is {given}, but data.train is photos, whose splits are fixed")
        val_share, test_share = (HELD_OUT_SHARE if one is None else one for one in (val_share, test_share))
        if min(val_share, test_share) < 0 or val_share + test_share >= 1:
            raise UserError(
                f"data.val_share and data.test_share are {val_share} and {test_share}, expected at least 0 "
                "and a sum below 1"
            )
        self.train, self.test, self.side, self.patches = train, test, side, patches
        self.shares = {"val": val_share, "test": 0.0 if test else test_share}
        self.weathers: list[str] = []
        """Names of the weathers, after ``setup``."""

    def files(self) -> list[str]:
        """None: images are too many to be read for a hash, and parts have versions."""
        return []

    def setup(self, stage: str) -> None:
        """Find the images.

        Raises:
            UserError: a folder or a file is missing or bad, a pair has two sizes, or a split is empty.
        """
        if self.sets:
            return
        if self.train == "photos":
            self.weathers = list(WEATHERS)
            known, held_out = split_photos(load_photos(default_part("photos")))
            for_val = [photo for name, photo in known.items() if name in VAL_PHOTOS]
            rest = [photo for name, photo in known.items() if name not in VAL_PHOTOS]
            count = EVALUATED * len(WEATHERS)
            self.sets = {
                "train": WeatheredPhotos(rest, self.patches, self.side, seed=0),
                "val": WeatheredPhotos(for_val, count, self.side, seed=1),
                "test": WeatheredPhotos(list(held_out.values()), count, self.side, seed=2),
            }
        else:
            splits = split_pairs(self._pairs(self.train), self.shares, self.train)
            crops = -(-self.patches // len(splits["train"]))
            self.sets = {
                split: PairedImages(pairs, self.side, crops if split == "train" else 0)
                for split, pairs in splits.items()
                if pairs
            }
        if self.test:
            self.sets["test"] = PairedImages(self._pairs(self.test), self.side)

    def _pairs(self, folder: str) -> list[Pair]:
        return find_pairs(Path(folder), self.side, self.weathers)


def find_pairs(folder: Path, side: int, weathers: list[str]) -> list[Pair]:
    """The files of ``input/`` with those of ``gt/``, in order; ``weathers`` gets the names that are new.

    Raises:
        UserError: a folder or a partner is missing, a file is no image, a pair has two sizes, or an image is
            smaller than a patch.
    """
    for name in ("input", "gt"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder} has no folder {name}/, expected input/NAME.png and gt/NAME.png")
    pairs = []
    for degraded in sorted((folder / "input").rglob("*")):
        if degraded.suffix.lower() not in IMAGE_TYPES:
            continue
        relative = degraded.relative_to(folder / "input")
        clear = folder / "gt" / relative
        if not clear.is_file():
            raise UserError(f"{clear} is missing, the clear image of {degraded}")
        size, other = image_size(degraded), image_size(clear)
        if size != other:
            raise UserError(
                f"{degraded} has {size[0]} x {size[1]} pixels, but {clear} {other[0]} x {other[1]}; expected "
                "the same"
            )
        if min(size) < side:
            raise UserError(
                f"{degraded} has {size[0]} x {size[1]} pixels, expected at least data.side, {side}"
            )
        weather, scene = folder.name, relative
        if len(relative.parts) > 1:
            weather, scene = relative.parts[0], relative.relative_to(relative.parts[0])
        if weather not in weathers:
            weathers.append(weather)
        name = scene.with_suffix("").as_posix()
        pairs.append(Pair(degraded, clear, name, weathers.index(weather), size))
    if not pairs:
        raise UserError(f"{folder}/input holds no images")
    return pairs


def split_pairs(pairs: list[Pair], shares: dict[str, float], folder: str) -> dict[str, list[Pair]]:
    """Pairs of each split, by their scenes.

    Raises:
        UserError: the training split, or another of a share above 0, has none.
    """
    splits: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    for pair in pairs:
        splits[split_of(pair.scene, **shares)].append(pair)
    for split, chosen in splits.items():
        if not chosen and shares.get(split, 1):
            flag = f"data.{split}_share" if split in shares else "data.val_share"
            raise UserError(f"{folder}: the {split} split of {len(pairs)} images is empty; see {flag}")
    return splits


def _batch(indices: list[int], patches: list[tuple[np.ndarray, np.ndarray, int]]) -> Batch:
    degraded, clear, weathers = zip(*patches, strict=True)
    bad, good = (
        torch.from_numpy(np.stack(one).transpose(0, 3, 1, 2).astype(np.float32)) for one in (degraded, clear)
    )
    return Batch(torch.tensor(indices), bad, good, torch.tensor(weathers))


def _read(path: Path, box: tuple[int, int, int, int]) -> np.ndarray:
    """[S, S, 3] in 0..1, a part of an image. Raises UserError where the file is broken."""
    return _pixels(read_image(path, "RGB").crop(box))


def _pixels(image: Image.Image) -> np.ndarray:
    """[S, S, 3] in 0..1."""
    return np.asarray(image, dtype=np.float64) / 255
