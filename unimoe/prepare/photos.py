"""scikit-image's photos that serve as pictures or backgrounds."""

from pathlib import Path
from zipfile import ZipFile

ROOT = "skimage/data/"
PHOTOS = (
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


def convert(wheel: ZipFile, folder: Path) -> None:
    """Write the photos as they are."""
    for name in PHOTOS:
        (folder / name).write_bytes(wheel.read(ROOT + name))
