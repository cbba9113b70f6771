"""A mixture and data for ``unimoe compress``; fixtures of tests/detection/conftest.py, for the detector."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unimoe.moe.view import view
from unimoe.testing import tiny_model

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


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    """A folder with a model whose experts differ, and data with images and speech."""
    moe = {"experts": {"copies": 4}, "router": {"k": 2}, "placement": "all"}
    folder = tmp_path_factory.mktemp("mixture")
    built, processor = tiny_model(folder, moe)
    for layer in view(built):
        for weight in layer.experts.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    built.save_pretrained(folder / "moe")
    processor.save_pretrained(folder / "moe")
    Image.new("RGB", (50, 40), "red").save(folder / "a.png")
    soundfile.write(folder / "q.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    for name, part in (("image", {"path": "a.png"}), ("speech", {"path": "q.wav"})):
        rows = [
            {"messages": [{"role": "user", "content": [{"type": name, **part},
                                                       {"type": "text", "text": "what " * number}]},
                          {"role": "assistant", "content": "this is it"}]}
            for number in range(1, 5)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
