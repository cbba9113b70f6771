"""Images in which several objects may be the salient one: sprites on photographs, with exact masks.

No people looked at these images. The preference for an object is a formula: larger and more central objects
are preferred.

Shapes: G plausible masks of an image, C candidate masks, S side.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from unimoe.prepare.cache import default_part

from .concepts import HELD_OUT, TRAINED
from .detection_scenes import SceneConfig, compose
from .sprites import load_photos, open_artist, split_photos

CANDIDATES = 4
"""Masks of each image whose preference is to be predicted."""
SALIENT = 0.5
"""An object is salient if its weight is at least this share of the largest."""


@dataclass(frozen=True)
class Example:
    """One image."""

    image: np.ndarray
    """[3, S, S] uint8."""
    masks: np.ndarray
    """[G, S, S] bool, the plausible masks."""
    preferences: np.ndarray
    """[G] float in 0..1, of each of them."""
    candidates: np.ndarray
    """[C, S, S] bool, masks of any quality."""
    scores: np.ndarray
    """[C] float in 0..1, the preference for each of them (:func:`preference`)."""


def draw_scenes(split: str, count: int, side: int) -> list[Example]:
    """Images of one split, each a function of its number.

    Training and validation images show the trained concepts on the training photographs; test images the
    held-out concepts on other photographs.
    """
    config = SceneConfig(size=side, objects=(1, 3), scale=(0.25, 0.5), crowded=0, small=0, hidden=0.25)
    artist = open_artist(default_part("sprites"))
    training, test = split_photos(load_photos(default_part("photos")))
    concepts, photos = (HELD_OUT, test) if split == "test" else (TRAINED, training)
    examples = []
    for number in range(count):
        rng = random.Random(f"saliency:{split}:{number}")
        photo = photos[rng.choice(list(photos))]
        image, objects = compose(concepts, artist, photo, config, rng, config.restyle * (split == "train"))
        masks, preferences = plausible([mask for _, mask in objects])
        pixels = np.asarray(image).transpose(2, 0, 1)
        examples.append(with_candidates(pixels, masks, preferences, rng))
    return examples


def weight(mask: np.ndarray) -> float:
    """Weight of an object in its image: its pixels, times 1 minus its distance from the centre over the
    side."""
    rows, columns = np.nonzero(mask)
    middle = (len(mask) - 1) / 2
    return len(rows) * (1 - float(np.hypot(rows.mean() - middle, columns.mean() - middle)) / len(mask))


def plausible(objects: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The plausible masks [G, S, S] of an image with these objects, and the preference for each [G].

    Each salient object alone, and, of several, all of them together. A mask is preferred as the mean weight
    of its objects over the largest weight, so the most salient object has 1.
    """
    weights = np.array([weight(mask) for mask in objects])
    salient = weights >= SALIENT * weights.max()
    masks = [mask for mask, shown in zip(objects, salient, strict=True) if shown]
    preferences = (weights[salient] / weights.max()).tolist()
    if len(masks) > 1:
        masks.append(np.logical_or.reduce(masks))
        preferences.append(float(np.mean(preferences)))
    return np.stack(masks), np.array(preferences, dtype=np.float32)


def preference(mask: np.ndarray, masks: np.ndarray, preferences: np.ndarray) -> float:
    """Preference for any mask [S, S]: the largest product of its IoU with a plausible mask and the preference
    for that one."""
    both, either = (mask & masks).sum((1, 2)), (mask | masks).sum((1, 2))
    return float((both / np.maximum(either, 1) * preferences).max())


def with_candidates(
    image: np.ndarray, masks: np.ndarray, preferences: np.ndarray, rng: random.Random
) -> Example:
    """An example whose candidates are changed plausible masks and discs."""
    candidates = np.stack([_candidate(masks, rng) for _ in range(CANDIDATES)])
    scores = np.array([preference(one, masks, preferences) for one in candidates], dtype=np.float32)
    return Example(image, masks, preferences, candidates, scores)


def _candidate(masks: np.ndarray, rng: random.Random) -> np.ndarray:
    """A plausible mask: as it is, grown, shrunk, moved, a half of it, with a disc; or a disc alone."""
    mask, side = masks[rng.randrange(len(masks))], masks.shape[1]
    kind = rng.choice(("exact", "grown", "shrunk", "moved", "half", "disc_added", "disc"))
    if kind in ("grown", "shrunk"):
        change = ImageFilter.MaxFilter if kind == "grown" else ImageFilter.MinFilter
        size = 2 * rng.randint(1, max(1, side // 16)) + 1
        return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(change(size))).astype(bool)
    if kind == "moved":
        return _moved(mask, *(rng.randint(-side // 6, side // 6) for _ in range(2)))
    if kind == "half":
        rows, columns = np.nonzero(mask)
        cut, axis = (rows.mean(), 0) if rng.random() < 0.5 else (columns.mean(), 1)
        first = np.expand_dims(np.arange(side) < cut, 1 - axis)
        return mask & (first if rng.random() < 0.5 else ~first)
    if kind in ("disc_added", "disc"):
        y, x = rng.uniform(0, side), rng.uniform(0, side)
        row, column = np.ogrid[:side, :side]
        disc = np.hypot(row - y, column - x) < side * rng.uniform(0.1, 0.25)
        return disc | mask if kind == "disc_added" else disc
    return mask


def _moved(mask: np.ndarray, down: int, right: int) -> np.ndarray:
    side, moved = len(mask), np.zeros_like(mask)
    to_rows, to_columns = (slice(max(0, by), side + min(0, by)) for by in (down, right))
    rows, columns = (slice(max(0, -by), side - max(0, by)) for by in (down, right))
    moved[to_rows, to_columns] = mask[rows, columns]
    return moved
