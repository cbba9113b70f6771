"""Composing pictures: sprites of one artist pasted on photographs, with the truth about what was pasted.

Every random choice comes from the ``random.Random`` that the caller hands in, so a picture is a function of
its seed.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from unimoe.demo.concepts import Concept
from unimoe.errors import UserError

SIZE = 160
"""Side of every composed picture in pixels: 5 x 5 cells of an EfficientNet."""
_SPRITE = 160
_PHOTO_TYPES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class Scene:
    """A picture and what is in it. ``shown`` goes from left to right; equal sprites count one by one."""

    image: Image.Image
    shown: list[Concept]
    colour: str | None
    """The word for the colour that most of a single sprite has, or None where no colour leads clearly."""


class FontArtist:
    """Draws emoji from a colour font that FreeType can paint (COLRv0 outlines or CBDT bitmaps)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._drawn: dict[str, Image.Image | None] = {}
        last = None
        for size in (144, 109, 128, 136, 160):  # a bitmap font has exactly one size
            try:
                self._font = ImageFont.truetype(str(path), size)
                return
            except OSError as error:
                last = error
        raise UserError(f"{path}: not a colour font that FreeType can draw ({last})")

    def sprite(self, char: str) -> Image.Image | None:
        """RGBA picture of ``char`` cut to its drawn pixels, longest side 160; None if the font lacks it."""
        if char not in self._drawn:
            canvas = Image.new("RGBA", (320, 320), (0, 0, 0, 0))
            ImageDraw.Draw(canvas).text((60, 60), char, font=self._font, embedded_color=True)
            self._drawn[char] = _trim(canvas)
        return self._drawn[char]


class FolderArtist:
    """Takes emoji from a folder of pictures named by code point (``1f436.png``, ``emoji_u1f436.png``,
    ``U+1F436.png``)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        for file in sorted(self.path.rglob("*.png")):
            match = re.fullmatch(r"(?:emoji_u|u\+)?([0-9a-f]{4,6})(?:[-_]fe0f)?", file.stem.lower())
            if match:
                self._files.setdefault(match[1].lstrip("0"), file)
        if not self._files:
            raise UserError(f"{path}: no pictures named by code point (such as 1f436.png) were found")

    def sprite(self, char: str) -> Image.Image | None:
        """RGBA picture of ``char`` cut to its drawn pixels, longest side 160; None if the folder lacks it."""
        file = self._files.get(f"{ord(char):x}")
        return _trim(Image.open(file).convert("RGBA")) if file else None


Artist = FontArtist | FolderArtist


def open_artist(path: str | Path) -> Artist:
    """A font file, or a folder that holds one font or many pictures."""
    path = Path(path)
    if path.is_dir():
        fonts = sorted(path.glob("*.ttf"))
        return FontArtist(fonts[0]) if fonts else FolderArtist(path)
    if not path.is_file():
        raise UserError(f"{path}: no such emoji font or folder of emoji pictures")
    return FontArtist(path)


def _trim(picture: Image.Image) -> Image.Image | None:
    box = picture.getchannel("A").point([0] * 17 + [255] * 239).getbbox()
    if box is None:
        return None
    picture = picture.crop(box)
    scale = _SPRITE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def load_photos(folder: str | Path) -> dict[str, Image.Image]:
    """Every photo of the folder by file name, RGB, longest side at most 512, names in order."""
    photos = {}
    for file in sorted(Path(folder).iterdir()):
        if file.suffix.lower() in _PHOTO_TYPES:
            picture = Image.open(file).convert("RGB")
            picture.thumbnail((512, 512))
            if min(picture.size) >= 96:
                photos[file.name] = picture
    if len(photos) < 4:
        raise UserError(
            f"{folder}: found {len(photos)} usable photos, expected at least 4 to paste sprites on"
        )
    return photos


def background(photo: Image.Image, rng: random.Random, restyle: bool = False) -> Image.Image:
    """A random square part of the photo, flipped and lightly recoloured, SIZE x SIZE.

    With ``restyle`` (training only) its colours are also exchanged, inverted or blurred, so that few photos
    go a long way.
    """
    side = int(min(photo.size) * rng.uniform(0.35, 1.0))
    x, y = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    part = photo.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if restyle:
        part = part.rotate(rng.choice((0, 90, 180, 270)))
        bands = list(part.split())
        rng.shuffle(bands)
        tint = [rng.uniform(0.5, 1.2) for _ in bands]
        part = Image.merge(
            "RGB",
            [
                band.point([min(255, int(v * t)) for v in range(256)])
                for band, t in zip(bands, tint, strict=True)
            ],
        )
        if rng.random() < 0.25:
            part = ImageOps.invert(part)
        if rng.random() < 0.3:
            part = part.filter(ImageFilter.GaussianBlur(rng.uniform(1, 8)))
    return ImageEnhance.Brightness(part).enhance(rng.uniform(0.7, 1.25))


def vary(sprite: Image.Image, rng: random.Random, side: float, restyle: bool = False) -> Image.Image:
    """One view of a sprite: flip, rotation within 25 degrees, colour jitter, longest side ``side`` pixels.

    With ``restyle`` (training only) the view may also lose what marks one artist's hand: dark outlines are
    thinned, colours drift in hue, edges blur.
    """
    rgb, alpha = sprite.convert("RGB"), sprite.getchannel("A")
    if restyle:
        rgb, alpha = _restyle(rgb, alpha, rng)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        rgb = enhancer(rgb).enhance(rng.uniform(0.75, 1.25))
    view = rgb.copy()
    view.putalpha(alpha)
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = side / max(view.size)
    view = view.resize(
        (max(4, round(view.width * scale)), max(4, round(view.height * scale))), Image.Resampling.LANCZOS
    )
    return view.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True)


def _restyle(rgb: Image.Image, alpha: Image.Image, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    if rng.random() < 0.5:
        # A maximum filter eats thin dark lines; the fill below keeps the empty surroundings from bleeding in.
        width = rng.choice((3, 5, 7))
        filled = Image.composite(rgb, Image.new("RGB", rgb.size, (0, 0, 0)), alpha)
        rgb = filled.filter(ImageFilter.MaxFilter(width))
        if rng.random() < 0.5:
            alpha = alpha.filter(ImageFilter.MinFilter(width))
    if rng.random() < 0.5:
        hue, saturation, value = rgb.convert("HSV").split()
        shift = rng.randint(-18, 18)
        hue = hue.point([(h + shift) % 256 for h in range(256)])
        rgb = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if rng.random() < 0.1:
        rgb = rgb.convert("L").convert("RGB")
    if rng.random() < 0.4:
        rgb = rgb.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3.0)))
    return rgb, alpha


def single(
    concept: Concept, artist: Artist, photo: Image.Image | None, rng: random.Random, restyle: bool = False
) -> Scene:
    """One sprite, 0.55 to 0.95 of the picture's side, anywhere; on a plain ground where ``photo`` is None."""
    ground = background(photo, rng, restyle and rng.random() < 0.5) if photo else _plain(rng)
    view = vary(_sprite(artist, concept), rng, SIZE * rng.uniform(0.55, 0.95), restyle)
    view = _fit(view, SIZE)
    x, y = rng.randint(0, SIZE - view.width), rng.randint(0, SIZE - view.height)
    ground.paste(view, (x, y), view)
    return Scene(ground, [concept], colour_word(view))


def several(
    concept: Concept,
    count: int,
    artist: Artist,
    photo: Image.Image | None,
    rng: random.Random,
    restyle: bool = False,
) -> Scene:
    """``count`` (1 to 4) like sprites in different quarters of the picture, so that none hides another."""
    ground = background(photo, rng, restyle and rng.random() < 0.5) if photo else _plain(rng)
    sprite, half = _sprite(artist, concept), SIZE // 2
    for quarter in rng.sample(range(4), count):
        view = _fit(vary(sprite, rng, half * rng.uniform(0.75, 0.98)), half)
        x = quarter % 2 * half + rng.randint(0, half - view.width)
        y = quarter // 2 * half + rng.randint(0, half - view.height)
        ground.paste(view, (x, y), view)
    return Scene(ground, [concept] * count, None)


def pair(
    left: Concept,
    right: Concept,
    artist: Artist,
    photo: Image.Image | None,
    rng: random.Random,
    restyle: bool = False,
) -> Scene:
    """Two sprites side by side."""
    ground = background(photo, rng, restyle and rng.random() < 0.5) if photo else _plain(rng)
    half = SIZE // 2
    for place, concept in enumerate((left, right)):
        view = _fit(vary(_sprite(artist, concept), rng, half * rng.uniform(0.85, 1.1), restyle), half)
        x = place * half + rng.randint(0, half - view.width)
        y = rng.randint(0, SIZE - view.height)
        ground.paste(view, (x, y), view)
    return Scene(ground, [left, right], None)


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
"""Upper end of each hue on Pillow's circle of 256."""


def colour_word(view: Image.Image) -> str | None:
    """The colour word of at least half of the opaque pixels that are not outline (near black), else None."""
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
