import numpy as np
import pytest
import torch
from PIL import Image

from unimoe.applications.diffusion import data as subject
from unimoe.applications.diffusion.data import DiffusionData
from unimoe.errors import UserError


class Painter:
    """Draws every emoji but clocks as a square whose grey tells the code point."""

    def sprite(self, char: str) -> Image.Image | None:
        number = ord(char)
        if 0x1F550 <= number <= 0x1F567:
            return None
        return Image.new("RGBA", (20, 10), (number % 256,) * 3 + (255,))


@pytest.fixture
def latents(tmp_path):
    for name in ("features", "labels"):
        (tmp_path / name).mkdir()
    for place in range(60):
        np.save(tmp_path / f"features/{place}.npy", np.full((1, 4, 2, 2), place, dtype=np.float32))
        np.save(tmp_path / f"labels/{place}.npy", np.array([place % 3]))
    return tmp_path


def test_latents_are_read_as_dit_writes_them(latents):
    data = DiffusionData(str(latents))
    data.setup("fit")
    assert sum(map(len, data.sets.values())) == 60 and data.classes == ["0", "1", "2"]
    assert data.shape == (4, 2)
    batch = data.sets["train"].__getitems__([2, 1])
    assert batch.images.shape == (2, 4, 2, 2) and batch.index.tolist() == [2, 1]
    assert batch.labels.tolist() == [int(image[0, 0, 0]) % 3 for image in batch.images]


def test_bad_latents_are_errors(latents):
    np.save(latents / "features/58.npy", np.zeros((1, 4, 3, 3), dtype=np.float32))
    with pytest.raises(UserError, match=r"58.npy is \[4, 3, 3\], expected \[4, 2, 2\] as 0.npy"):
        DiffusionData(str(latents)).setup("fit")
    np.save(latents / "features/58.npy", np.zeros((1, 4, 2, 2), dtype=np.float32))
    (latents / "features/59.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"59.npy cannot be read"):
        DiffusionData(str(latents)).setup("fit")
    np.save(latents / "features/59.npy", np.zeros((4, 2), dtype=np.float32))
    with pytest.raises(UserError, match=r"is \[4, 2\], expected \[1, channels, side, side\]"):
        DiffusionData(str(latents)).setup("fit")
    np.save(latents / "features/59.npy", np.zeros((1, 4, 2, 2), dtype=np.float32))
    for label, found in ((4, "class 4, expected 3"), (-1, "class -1, expected 0")):
        np.save(latents / "labels/8.npy", np.array([label]))
        with pytest.raises(UserError, match=f"holds {found}"):
            DiffusionData(str(latents)).setup("fit")
    (latents / "labels/7.npy").unlink()
    with pytest.raises(UserError, match=r"labels/7.npy is missing"):
        DiffusionData(str(latents)).setup("fit")
    with pytest.raises(UserError, match="has no folder features/"):
        DiffusionData(str(latents / "labels")).setup("fit")


def test_texts_are_the_names_of_sprites(monkeypatch):
    def embed(names):
        return torch.arange(len(names))[:, None].float().expand(-1, 5)

    monkeypatch.setattr(subject, "embed_texts", embed)
    monkeypatch.setattr(subject, "open_artist", lambda path: Painter())
    monkeypatch.setattr(subject, "default_part", lambda name: name)
    data = DiffusionData("sprites", side=8, condition="text")
    data.setup("fit")
    train = data.sets["train"]
    batch = train.__getitems__([0, 1, 2])
    assert batch.texts.shape == (3, 5) and data.text == 5
    assert batch.texts[0].equal(batch.texts[1]) and not batch.texts[0].equal(batch.texts[2]), "two artists"
    with pytest.raises(UserError, match="which only sprites have"):
        DiffusionData("somewhere", condition="text")
