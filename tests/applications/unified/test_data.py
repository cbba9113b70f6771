import numpy as np
import pytest
from PIL import Image

from unimoe.applications.unified.data import UnifiedData, read_classes
from unimoe.errors import UserError
from unimoe.training.application import split_of


@pytest.fixture
def folder(tmp_path):
    for place in range(40):
        path = tmp_path / ("cat", "dog")[place % 2] / f"{place:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (10 + place, 10), (255 * (place % 2),) * 3).save(path)
    return tmp_path


def test_folders_are_classes(folder):
    data = UnifiedData(str(folder), side=4)
    data.setup("fit")
    assert data.classes == ["cat", "dog"] and sum(map(len, data.sets.values())) == 40
    batch = data.sets["train"].__getitems__(list(range(len(data.sets["train"]))))
    assert batch.images.shape[1:] == (3, 4, 4), "of unequal sizes, resized"
    assert np.array_equal(batch.images[:, 0, 0, 0], 2 * batch.labels - 1)


def test_a_new_image_moves_no_other(folder):
    (_, before) = read_classes(folder, 4)
    Image.new("RGB", (4, 4)).save(folder / "cat/000.png")
    (_, after) = read_classes(folder, 4)
    for split, one in before.items():
        assert len(after[split]) - len(one) == (split == split_of("cat/000"))


def test_bad_folders_are_errors(folder):
    def message() -> str:
        with pytest.raises(UserError) as found:
            read_classes(folder, 4)
        return str(found.value)

    (folder / "emu").mkdir()
    assert "emu has no image in the train split" in message()
    (folder / "emu").rmdir()
    (folder / "cat/00.png").write_bytes(b"no image")
    assert "00.png cannot be read as an image" in message()
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cat/00.png")
    (folder / "cat/00.png").write_bytes((folder / "cat/00.png").read_bytes()[:400])
    assert "00.png cannot be read as an image" in message(), "truncated"
    for path in folder.rglob("*.png"):
        if path.stem > "02":
            path.unlink()
    (folder / "cat/00.png").unlink()
    Image.new("RGB", (4, 4)).save(folder / "cat/00.png")
    assert "the val split of 3 images is empty" in message()
    with pytest.raises(UserError, match="holds 0 folders, expected one for each of at least two classes"):
        read_classes(folder / "nowhere", 4)
    with pytest.raises(UserError, match="data.side is 0"):
        UnifiedData(side=0)
