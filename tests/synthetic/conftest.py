import pytest
from PIL import Image

from unimoe.synthetic.concepts import HELD_OUT, TRAINED
from unimoe.synthetic.sprites import open_artist


@pytest.fixture(scope="session")
def artist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sprites")
    for concept in TRAINED + HELD_OUT:
        Image.new("RGBA", (72, 40), (255, 0, 0, 255)).save(folder / f"{ord(concept.char):x}.png")
    return open_artist(folder)


@pytest.fixture(scope="session")
def photo():
    return Image.new("RGB", (200, 180), (0, 90, 0))
