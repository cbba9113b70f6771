"""Sprites and photographs, the parts that composed pictures are made of: artists that draw emoji, photos to
paste them on, and random views of both.

Every random choice comes from the ``random.Random`` that the caller hands in, so a picture is a function of
its seed.
"""

import random
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from unimoe.errors import UserError

TEST_PHOTOS = ("astronaut", "grass", "rocket")
"""Stems of the prepared photos that only test pictures stand on."""
_SPRITE = 160
_PHOTO_TYPES = {".png", ".jpg", ".jpeg", ".webp"}


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


def split_photos(photos: dict[str, Image.Image]) -> tuple[dict[str, Image.Image], dict[str, Image.Image]]:
    """Photos for training and photos for tests, by name.

    The tests get TEST_PHOTOS, or every fifth photo of a folder that has none of these.
    """
    test = [name for name in photos if Path(name).stem in TEST_PHOTOS] or list(photos)[::5]
    return {n: p for n, p in photos.items() if n not in test}, {n: photos[n] for n in test}


def background(photo: Image.Image, rng: random.Random, size: int, restyle: bool = False) -> Image.Image:
    """A random square part of the photo, flipped and lightly recoloured, ``size`` x ``size``.

    With ``restyle`` (training only) its colours are also exchanged, inverted or blurred, so that few photos
    go a long way.
    """
    side = int(min(photo.size) * rng.uniform(0.35, 1.0))
    x, y = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    part = photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR)
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
