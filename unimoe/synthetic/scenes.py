"""Generated images: sprites of one artist pasted on photos, with ground truth.

Every random choice comes from the caller's ``random.Random``, so an image is a function of its seed.
"""

import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from unimoe.errors import UserError

from .concepts import Concept
from .sprites import Artist, background, vary

SIZE = 160
"""Side of every generated image in pixels."""

FRAMES = 8
"""Frames of every generated video."""


Region = tuple[str, list[float]]
"""A name, and its box x0, y0, x1, y1 from 0 to 1."""


@dataclass
class Scene:
    """An image and its content. ``shown`` is ordered from left to right and repeats equal sprites."""

    image: Image.Image
    shown: list[Concept]
    colour: str | None
    """The dominant colour of a single sprite, None if no colour dominates."""
    regions: list[Region] = field(default_factory=list)
    """Where each sprite is; also the quarters that hold ``nothing``, where sprites are counted."""


def single(
    concept: Concept, artist: Artist, photo: Image.Image | None, rng: random.Random, restyle: bool = False
) -> Scene:
    """One sprite, 0.55 to 0.95 of the image's side, anywhere; on a plain background if ``photo`` is None."""
    ground = background(photo, rng, SIZE, restyle and rng.random() < 0.5) if photo else _plain(rng)
    view = vary(_sprite(artist, concept), rng, SIZE * rng.uniform(0.55, 0.95), restyle)
    view = _fit(view, SIZE)
    x, y = rng.randint(0, SIZE - view.width), rng.randint(0, SIZE - view.height)
    ground.paste(view, (x, y), view)
    return Scene(ground, [concept], colour_word(view), [_region(concept.name, x, y, view.width, view.height)])


def several(
    concept: Concept,
    count: int,
    artist: Artist,
    photo: Image.Image | None,
    rng: random.Random,
    restyle: bool = False,
) -> Scene:
    """``count`` (1 to 4) copies of a sprite in different quarters of the image, without overlap."""
    ground = background(photo, rng, SIZE, restyle and rng.random() < 0.5) if photo else _plain(rng)
    sprite, half = _sprite(artist, concept), SIZE // 2
    taken = rng.sample(range(4), count)
    regions = [
        _region("nothing", q % 2 * half, q // 2 * half, half, half) for q in range(4) if q not in taken
    ]
    for quarter in taken:
        view = _fit(vary(sprite, rng, half * rng.uniform(0.75, 0.98)), half)
        x = quarter % 2 * half + rng.randint(0, half - view.width)
        y = quarter // 2 * half + rng.randint(0, half - view.height)
        ground.paste(view, (x, y), view)
        regions.append(_region(concept.name, x, y, view.width, view.height))
    return Scene(ground, [concept] * count, None, regions)


def pair(
    left: Concept,
    right: Concept,
    artist: Artist,
    photo: Image.Image | None,
    rng: random.Random,
    restyle: bool = False,
) -> Scene:
    """Two sprites side by side."""
    ground = background(photo, rng, SIZE, restyle and rng.random() < 0.5) if photo else _plain(rng)
    half, regions = SIZE // 2, []
    for place, concept in enumerate((left, right)):
        view = _fit(vary(_sprite(artist, concept), rng, half * rng.uniform(0.85, 1.1), restyle), half)
        x = place * half + rng.randint(0, half - view.width)
        y = rng.randint(0, SIZE - view.height)
        ground.paste(view, (x, y), view)
        regions.append(_region(concept.name, x, y, view.width, view.height))
    return Scene(ground, [left, right], None, regions)


def one_after_another(
    first: Concept, second: Concept, artist: Artist, photo: Image.Image, rng: random.Random
) -> list[Image.Image]:
    """The frames of a video that shows one sprite, then another one elsewhere."""
    ground = background(photo, rng, SIZE)
    change = rng.randint(3, FRAMES - 3)
    frames = []
    for concept, count in ((first, change), (second, FRAMES - change)):
        view = _fit(vary(_sprite(artist, concept), rng, SIZE * rng.uniform(0.55, 0.9)), SIZE)
        x, y = rng.randint(0, SIZE - view.width), rng.randint(0, SIZE - view.height)
        frames += [_paste(ground, view, x + rng.randint(-3, 3), y + rng.randint(-3, 3)) for _ in range(count)]
    return frames


def moving(
    concept: Concept, direction: str, artist: Artist, photo: Image.Image, rng: random.Random
) -> list[Image.Image]:
    """The frames of a video in which a sprite moves ``left``, ``right``, ``up`` or ``down``."""
    ground = background(photo, rng, SIZE)
    view = _fit(vary(_sprite(artist, concept), rng, SIZE * rng.uniform(0.4, 0.55)), SIZE * 6 // 10)
    room_x, room_y = SIZE - view.width, SIZE - view.height
    frames = []
    for index in range(FRAMES):
        way = index / (FRAMES - 1)
        way = 1 - way if direction in ("left", "up") else way
        x, y = (way * room_x, room_y / 2) if direction in ("left", "right") else (room_x / 2, way * room_y)
        frames.append(_paste(ground, view, round(x) + rng.randint(-2, 2), round(y) + rng.randint(-2, 2)))
    return frames


def _region(name: str, x: int, y: int, width: int, height: int) -> Region:
    return name, [round(edge / SIZE, 4) for edge in (x, y, x + width, y + height)]


def _paste(ground: Image.Image, view: Image.Image, x: int, y: int) -> Image.Image:
    frame = ground.copy()
    frame.paste(view, (x, y), view)
    return frame


def _sprite(artist: Artist, concept: Concept) -> Image.Image:
    sprite = artist.sprite(concept.char)
    if sprite is None:
        raise UserError(f"{artist.path}: has no drawing of {concept.name} (U+{ord(concept.char):X})")
    return sprite


def _fit(view: Image.Image, side: int) -> Image.Image:
    view.thumbnail((side, side), Image.Resampling.LANCZOS)
    return view


def _plain(rng: random.Random) -> Image.Image:
    light = rng.randint(150, 255)
    return Image.new("RGB", (SIZE, SIZE), tuple(min(255, light + rng.randint(-25, 25)) for _ in range(3)))


_HUES = (
    (11, "red"),
    (27, "orange"),
    (47, "yellow"),
    (115, "green"),
    (175, "blue"),
    (207, "purple"),
    (240, "pink"),
    (256, "red"),
)
"""Upper bound of each hue in Pillow's range of 256."""


def colour_word(view: Image.Image) -> str | None:
    """The colour of at least 55 % of the opaque pixels outside the (near black) outline, else None."""
    pixels = np.asarray(view.convert("RGB").convert("HSV")).reshape(-1, 3)
    opaque = np.asarray(view.getchannel("A")).reshape(-1) > 128
    hue, saturation, value = pixels[opaque].T.astype(int)
    coloured = value > 60
    if coloured.sum() < 0.3 * max(1, opaque.sum()):
        return "black"
    hue, saturation, value = hue[coloured], saturation[coloured], value[coloured]
    grey = saturation < 45
    words = np.select(
        [grey & (value > 200), grey, (hue < 30) & (value < 170)],
        ["white", "gray", "brown"],
        default=np.asarray([word for _, word in _HUES])[
            np.searchsorted([end for end, _ in _HUES], hue, side="right")
        ],
    )
    names, counts = np.unique(words, return_counts=True)
    best = counts.argmax()
    return str(names[best]) if counts[best] >= 0.55 * counts.sum() else None
