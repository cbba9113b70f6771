"""Generates a data set in COCO format: emoji on photographs, with exact boxes and masks.

folder/train.json + train/000000.jpg ...          seen concepts on seen backgrounds
folder/val.json + val/...                         the same, other images
folder/unseen_backgrounds.json + ...              seen concepts on photos that are not in the training images
folder/unseen_concepts.json + ...                 concepts and photos that are not in the training images
folder/unseen_artist.json + ...                   the same, drawn by an artist who is not either
folder/manifest.json                              settings, concepts and photos of the splits

Boxes and masks cover visible pixels only: later sprites occlude earlier ones.
"""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from unimoe.errors import UserError
from unimoe.files import atomic_folder
from unimoe.prepare.cache import default_part

from .concepts import HELD_OUT, TRAINED, Concept
from .more_concepts import MORE_HELD_OUT, MORE_TRAINED
from .sprites import Artist, background, load_photos, open_artist, split_photos, vary

logger = logging.getLogger(__name__)

_OPAQUE = 16
"""Alpha above which a pixel of a sprite counts as drawn."""
_TRIES = 8
"""Attempts to place a sprite."""
MOST_SEEN, MOST_UNSEEN = len(TRAINED + MORE_TRAINED), len(HELD_OUT + MORE_HELD_OUT)


def seen_concepts(count: int) -> list[Concept]:
    """The concepts of training images: up to 74 spread evenly over the groups of TRAINED; beyond that all of
    TRAINED and, spread evenly over their groups, further ones."""
    first = min(count, len(TRAINED))
    return [*_spread(TRAINED, first), *_spread(MORE_TRAINED, count - first)]


def unseen_concepts(count: int = MOST_UNSEEN) -> list[Concept]:
    """The concepts of held-out tests: HELD_OUT, then further ones."""
    first = min(count, len(HELD_OUT))
    return [*_spread(HELD_OUT, first), *_spread(MORE_HELD_OUT, count - first)]


def _spread(concepts: Sequence[Concept], count: int) -> list[Concept]:
    return [concepts[i * len(concepts) // count] for i in range(count)]


@dataclass
class SceneConfig:
    images: int = 3000
    """Training images."""
    test_images: int = 150
    """Images in each of the other splits."""
    size: int = 192
    """Side of an image in pixels."""
    concepts: int = len(TRAINED)
    """Number of seen concepts, up to 731."""
    tested: int | None = None
    """Number of seen concepts that the test images show (default: all). With hundreds, a test of 150 images
    shows most of them once or never."""
    unseen: int = len(HELD_OUT)
    """Number of unseen concepts, up to 58."""
    objects: tuple[int, int] = (1, 5)
    """Minimum and maximum number of sprites in an image that is not crowded."""
    scale: tuple[float, float] = (0.15, 0.5)
    """Range of the longest side of a sprite, as a fraction of the image's side."""
    crowded: float = 0.15
    """Fraction of the images with 6 to 12 smaller sprites close together, of few concepts."""
    small: float = 0.15
    """Fraction of the sprites whose size is 0.06 to 0.15 of the side."""
    hidden: float = 0.4
    """Maximum fraction of a sprite that others may occlude."""
    restyle: float = 0.3
    """Fraction of the training sprites and backgrounds whose style is changed."""
    seed: int = 0
    """The same seed and parts give the same files, byte for byte."""

    def __post_init__(self):
        most = {"concepts": MOST_SEEN, "tested": self.concepts, "unseen": MOST_UNSEEN}
        for name in ("images", "test_images", *most):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: found {value}, expected at least 1")
            if value is not None and value > most.get(name, value):
                raise UserError(f"--{name}: found {value}, expected at most {most[name]}")
        if self.size < 64:
            raise UserError(f"--size: found {self.size} pixels, expected at least 64")


def scenes(
    folder: str,
    images: int = 3000,
    test_images: int = 150,
    size: int = 192,
    concepts: int = len(TRAINED),
    tested: int | None = None,
    unseen: int = len(HELD_OUT),
    crowded: float = 0.15,
    small: float = 0.15,
    restyle: float = 0.3,
    seed: int = 0,
    sprites: str | None = None,
    photos: str | None = None,
    artist: str | None = None,
) -> None:
    """Write a COCO-format data set of emoji on photographs.

    Splits: train, val, unseen_backgrounds, unseen_concepts, unseen_artist; each is a JSON file beside a
    folder of images.

    Args:
        folder: output folder; an existing data set of scenes is replaced.
        images: number of training images.
        test_images: number of images in each of the other splits.
        size: side of an image in pixels.
        concepts: number of seen concepts, up to 731.
        tested: number of seen concepts that the test images show (default: all).
        unseen: number of unseen concepts, up to 58.
        crowded: fraction of the images with many small sprites close together.
        small: fraction of the sprites whose size is 0.06 to 0.15 of the side.
        restyle: fraction of the training sprites and backgrounds whose style is changed.
        seed: the same seed gives the same files, byte for byte.
        sprites: an emoji font or a folder of emoji images (default: the prepared font).
        photos: a folder of at least four photographs (default: the prepared ones).
        artist: as sprites, for the split unseen_artist (default: the prepared artist; without it the split is
            left out).

    Raises:
        UserError: for a setting out of range, unusable sprites or photos, or a folder that holds other files.
    """
    config = SceneConfig(
        images,
        test_images,
        size,
        concepts,
        tested,
        unseen,
        crowded=crowded,
        small=small,
        restyle=restyle,
        seed=seed,
    )
    build_scenes(folder, config, sprites, photos, artist)


def build_scenes(
    folder: str | Path,
    config: SceneConfig | None = None,
    sprites: str | Path | None = None,
    photos: str | Path | None = None,
    other_artist: str | Path | None = None,
) -> Path:
    """Write the data set that is described at the top of this file.

    Args:
        folder: output folder; an existing data set of scenes is replaced.
        config: sizes and fractions; the concepts are those of :func:`seen_concepts` and
            :func:`unseen_concepts`.
        sprites: a font or folder (default: the prepared font).
        photos: a folder (default: the prepared photos).
        other_artist: a font or folder for ``unseen_artist`` (default: the prepared artist; where that is not
            prepared, the split is left out with a warning).

    Returns:
        The output folder.

    Raises:
        UserError: for unusable sprites or photos, or a folder that holds other files.
    """
    config = config or SceneConfig()
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: holds files that are not a data set of scenes; choose another folder")
    artist = open_artist(sprites or default_part("sprites"))
    train_photos, test_photos = split_photos(load_photos(photos or default_part("photos")))
    seen, unseen = seen_concepts(config.concepts), unseen_concepts(config.unseen)
    tested = _spread(seen, config.tested or config.concepts)
    every = (*TRAINED, *HELD_OUT, *MORE_TRAINED, *MORE_HELD_OUT)
    category_ids = {concept.name: i for i, concept in enumerate(every, 1)}
    splits = {
        "train": (config.images, seen, train_photos, artist),
        "val": (config.test_images, tested, train_photos, artist),
        "unseen_backgrounds": (config.test_images, tested, test_photos, artist),
        "unseen_concepts": (config.test_images, unseen, test_photos, artist),
    }
    second = _second_artist(other_artist)
    if second is not None:
        splits["unseen_artist"] = (config.test_images, unseen, test_photos, second)
    total = sum(count for count, *_ in splits.values())
    logger.info("writing %d scenes of %d pixels to %s", total, config.size, folder)
    with atomic_folder(folder) as temporary:
        for split, (count, concepts, grounds, drawn_by) in splits.items():
            (temporary / split).mkdir()
            images, annotations = [], []
            for i in range(count):
                rng = random.Random(f"{config.seed}:{split}:{i}")
                restyle = config.restyle if split == "train" else 0.0
                photo = grounds[rng.choice(list(grounds))]
                image, objects = compose(concepts, drawn_by, photo, config, rng, restyle)
                name = f"{split}/{i:06d}.jpg"
                image.save(temporary / name, quality=92)
                images.append({"id": i + 1, "file_name": name, "width": config.size, "height": config.size})
                for concept, mask in objects:
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": i + 1,
                            "category_id": category_ids[concept.name],
                            **annotation(mask),
                        }
                    )
            categories = [
                {"id": category_ids[c.name], "name": c.name, "supercategory": c.group} for c in concepts
            ]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (temporary / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
        manifest = {
            "config": asdict(config),
            "concepts": {"seen": [c.name for c in seen], "unseen": [c.name for c in unseen]},
            "photos": {"seen": list(train_photos), "unseen": list(test_photos)},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return folder


def _second_artist(path: str | Path | None) -> Artist | None:
    """The artist of ``unseen_artist``, None with a warning where the default one is not prepared."""
    try:
        return open_artist(path or default_part("artist"))
    except UserError as error:
        if path is not None:
            raise
        logger.warning("no images of unseen_artist: %s", error)
        return None


def compose(
    concepts: Sequence[Concept],
    artist: Artist,
    photo: Image.Image,
    config: SceneConfig,
    rng: random.Random,
    restyle: float = 0.0,
) -> tuple[Image.Image, list[tuple[Concept, np.ndarray]]]:
    """One image and its objects: (concept, bool mask [size, size] of the visible pixels)."""
    size = config.size
    image = background(photo, rng, size, rng.random() < restyle)
    low, high = config.scale
    crowded = rng.random() < config.crowded
    if crowded:
        count, (low, high) = rng.randint(6, 12), (0.6 * low, 0.6 * high)
        concepts = rng.sample(list(concepts), min(len(concepts), rng.randint(1, 4)))
        middle = rng.uniform(0.3, 0.7) * size
    else:
        count, middle = rng.randint(*config.objects), None
    shown: list[Concept] = []
    areas: list[int] = []
    masks: list[np.ndarray] = []
    for _ in range(count):
        concept = rng.choice(concepts)
        share = rng.uniform(0.06, 0.15) if rng.random() < config.small else rng.uniform(low, high)
        view = _view(artist, concept, share * size, rng, rng.random() < restyle)
        drawn = np.asarray(view.getchannel("A")) > _OPAQUE
        for _ in range(_TRIES):
            x, y = _place(view.width, size, rng, middle), _place(view.height, size, rng, middle)
            mask = np.zeros((size, size), bool)
            mask[y : y + view.height, x : x + view.width] = drawn
            left = [int((other & ~mask).sum()) for other in masks]
            if all(now >= (1 - config.hidden) * area for now, area in zip(left, areas, strict=True)):
                masks = [other & ~mask for other in masks]
                image.paste(view, (x, y), view)
                shown.append(concept)
                masks.append(mask)
                areas.append(int(mask.sum()))
                break
    return image, list(zip(shown, masks, strict=True))


def annotation(mask: np.ndarray) -> dict:
    """COCO fields of a bool mask [height, width]: bbox (x, y, width, height), area, segmentation (RLE)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    run_lengths: Any = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": run_lengths["counts"].decode("ascii")},
        "iscrowd": 0,
    }


def _view(artist: Artist, concept: Concept, side: float, rng: random.Random, restyle: bool) -> Image.Image:
    sprite = artist.sprite(concept.char)
    if sprite is None:
        raise UserError(f"{artist.path}: has no drawing of {concept.name} (U+{ord(concept.char):X})")
    if not restyle:  # jittering fewer pixels is faster; restyling needs outlines at full size
        sprite = sprite.copy()
        sprite.thumbnail((round(side), round(side)))
    view = vary(sprite, rng, side, restyle)
    return view.crop(view.getchannel("A").point([0] * (_OPAQUE + 1) + [255] * (255 - _OPAQUE)).getbbox())


def _place(side: int, size: int, rng: random.Random, middle: float | None) -> int:
    """Start of a sprite of ``side`` pixels along one axis: anywhere, or around ``middle``."""
    if middle is None:
        return rng.randint(0, size - side)
    return min(size - side, max(0, round(rng.gauss(middle, 0.2 * size) - side / 2)))
