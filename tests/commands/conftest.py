"""Fixtures of tests/detection/conftest.py, for the commands of the detector."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

_FILE = Path(__file__).parents[1] / "detection" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("detection_fixtures", _FILE)
assert _SPEC and _SPEC.loader
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)
folder, settings, sizes, tokenizer, world = (
    getattr(_FIXTURES, name) for name in ("folder", "settings", "sizes", "tokenizer", "world")
)


@pytest.fixture
def pictures(tmp_path):
    """Grey, transparent, turned by EXIF, and plain, in a folder."""
    place = tmp_path / "pictures"
    place.mkdir()
    Image.new("L", (50, 40), 90).save(place / "grey.png")
    Image.new("RGBA", (40, 50), (9, 200, 9, 100)).save(place / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30), "red").save(place / "turned.jpg", exif=exif)
    (place / "in").mkdir()
    Image.new("RGB", (300, 200), "blue").save(place / "in" / "plain.jpg")
    (place / "notes.txt").write_text("no picture")
    return place
