"""Sprites and photographs for synthetic images: artists that draw emoji, photos to paste them on, and random
views of both.

All random choices use the ``random.Random`` of the caller, so an image is a function of its seed.
"""

import random
import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from unimoe.errors import UserError

TEST_PHOTOS = ("astronaut", "grass", "rocket")
"""Names, without suffix, of the prepared photos that are backgrounds of test images only."""
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
        """RGBA image of ``char``, cropped to what is drawn, longest side 160; None if the font lacks it."""
        if char not in self._drawn:
            canvas = Image.new("RGBA", (320, 320), (0, 0, 0, 0))
            ImageDraw.Draw(canvas).text((60, 60), char, font=self._font, embedded_color=True)
            self._drawn[char] = _trim(canvas)
        return self._drawn[char]


class FolderArtist:
    """Reads emoji from a folder of images named by code point (``1f436.png``, ``emoji_u1f436.png``,
    ``U+1F436.png``)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._files: dict[str, Path] = {}
        for file in sorted(one for one in self.path.rglob("*") if one.suffix in (".png", ".webp")):
            match = re.fullmatch(r"(?:emoji_u|u\+)?([0-9a-f]{4,6})(?:[-_]fe0f)?", file.stem.lower())
            if match:
                self._files.setdefault(match[1].lstrip("0"), file)
        if not self._files:
            raise UserError(f"{path}: no images named by code point (such as 1f436.png) were found")

    def sprite(self, char: str) -> Image.Image | None:
        """RGBA image of ``char``, cropped to what is drawn, longest side 160; None if it is not there."""
        file = self._files.get(f"{ord(char):x}")
        return _trim(Image.open(file).convert("RGBA")) if file else None


Artist = FontArtist | FolderArtist


def open_artist(path: str | Path) -> Artist:
    """Open a font file, or a folder with a font or images.

    Raises:
        UserError: there is no such font or folder, or no emoji in it.
    """
    path = Path(path)
    if path.is_dir():
        fonts = sorted(path.glob("*.ttf"))
        return FontArtist(fonts[0]) if fonts else FolderArtist(path)
    if not path.is_file():
        raise UserError(f"{path}: no such emoji font or folder of emoji images")
    return FontArtist(path)


def _trim(image: Image.Image) -> Image.Image | None:
    box = image.getchannel("A").point([0] * 17 + [255] * 239).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = _SPRITE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def load_photos(folder: str | Path) -> dict[str, Image.Image]:
    """The photos of a folder by file name, in order: RGB, longest side at most 512.

    Raises:
        UserError: fewer than four photos are large enough.
    """
    photos = {}
    for file in sorted(Path(folder).iterdir()):
        if file.suffix.lower() in _PHOTO_TYPES:
            image = Image.open(file).convert("RGB")
            image.thumbnail((512, 512))
            if min(image.size) >= 96:
                photos[file.name] = image
    if len(photos) < 4:
        raise UserError(
            f"{folder}: found {len(photos)} usable photos, expected at least 4 to paste sprites on"
        )
    return photos


def split_photos(photos: dict[str, Image.Image]) -> tuple[dict[str, Image.Image], dict[str, Image.Image]]:
    """Photos for training and for tests, by name.

    The tests get TEST_PHOTOS, or every fifth photo of a folder without any of these.
    """
    test = [name for name in photos if Path(name).stem in TEST_PHOTOS] or list(photos)[::5]
    return {n: p for n, p in photos.items() if n not in test}, {n: photos[n] for n in test}


def background(photo: Image.Image, rng: random.Random, size: int, restyle: bool = False) -> Image.Image:
    """A random square crop of the photo, ``size`` x ``size``, with random flip and brightness.

    ``restyle`` (training only) also rotates it, permutes or inverts its colours or blurs it, so that a few
    photos give many backgrounds.
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
    """A random view of a sprite, longest side ``side`` pixels: flip, rotation by up to 25 degrees, jitter.

    ``restyle`` (training only) also varies the artist's style: thinner outlines, other hues, blurred edges.
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
        # a maximum filter removes thin dark lines; filling with black keeps the background from bleeding in
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
