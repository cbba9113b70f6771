import numpy as np
import pytest
from PIL import Image

from unimoe.applications.saliency.data import SaliencyData
from unimoe.errors import UserError


def draw(path, *boxes, size=(20, 10), mode="L"):
    image = Image.new(mode, size)
    for box in boxes:
        image.paste(255 if mode == "L" else (255, 0, 0), box)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    """Forty images of 20 x 10 pixels; every second has two masks."""
    for number in range(40):
        draw(tmp_path / f"images/{number:02d}.png", (0, 0, 10, 10), mode="RGB")
        if number % 2:
            draw(tmp_path / f"masks/{number:02d}.png", (0, 0, 10, 10))
        else:
            draw(tmp_path / f"masks/{number:02d}/a.png", (0, 0, 10, 10))
            draw(tmp_path / f"masks/{number:02d}/b.png", (0, 0, 20, 10))
    return tmp_path


def test_a_folder_has_sets_of_masks(folder):
    data = SaliencyData(str(folder), side=8)
    data.setup("fit")
    data.setup("test")
    assert set(data.sets) == {"train", "val", "test"} and sum(map(len, data.sets.values())) == 40
    batch = data.sets["train"].__getitems__([0, 1])
    assert (
        batch.images.shape == (2, 3, 8, 8)
        and batch.images[0, 0, 0, 0] == 1
        and batch.images[0, 0, 0, 7] == -1
    )
    assert batch.count.tolist() == [2, 1] and batch.preferences.tolist() == [[1, 1], [1, 0]]
    assert batch.masks[0].mean(dim=(1, 2)).tolist() == [0.5, 1] and not batch.masks[1, 1].any()
    assert batch.scores.shape == (2, 4)
    again = data.sets["train"].__getitems__([0, 1])
    assert again.candidates.equal(batch.candidates)


def test_preferences_are_read(folder):
    names = [path.relative_to(folder / "masks") for path in (folder / "masks").rglob("*.png")]
    rows = [f"{name},{0.25 if name.stem == 'a' else 0.5}" for name in names]
    (folder / "preferences.csv").write_text("\n".join(["mask,score", *rows]))
    data = SaliencyData(str(folder), side=8)
    data.setup("fit")
    assert data.sets["train"].__getitems__([0]).preferences.tolist() == [[0.25, 0.5]]
    (folder / "preferences.csv").write_text("\n".join(["mask,score", *rows[:-1]]))
    with pytest.raises(UserError, match=r"has no score, expected one in 0..1"):
        SaliencyData(str(folder), side=8).setup("fit")
    (folder / "preferences.csv").write_text("picture,score\n")
    with pytest.raises(UserError, match=r"has no column 'mask'; its columns are picture, score"):
        SaliencyData(str(folder), side=8).setup("fit")


def test_bad_folders_are_errors(folder):
    def message(side: int = 8) -> str:
        with pytest.raises(UserError) as found:
            SaliencyData(str(folder), side=side).setup("fit")
        return str(found.value)

    draw(folder / "masks/03.png", (0, 0, 5, 5), size=(10, 10))
    assert "03.png has 10 x 10 pixels, expected 20 x 10 as 03.png" in message()
    (folder / "masks/03").mkdir()
    assert "03.png has masks in" in message()
    (folder / "masks/03").rmdir()
    draw(folder / "masks/03.png")
    assert "03.png is black, expected an object in white" in message()
    (folder / "masks/03.png").write_bytes(b"no image")
    assert "03.png cannot be read as an image" in message()
    (folder / "masks/03.png").unlink()
    assert "03.png has no mask, expected" in message()
    for path in (folder / "images").iterdir():
        if path.stem > "01":
            path.unlink()
    assert "the val split of 2 images is empty" in message()
    with pytest.raises(UserError, match="has no folder images/"):
        SaliencyData(str(folder / "masks")).setup("fit")


@pytest.mark.parametrize("name", ["images/00.png", "masks/01.png"])
def test_a_truncated_file_is_named(folder, name):
    noise = np.random.default_rng(0).integers(0, 255, (10, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:400])
    with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
        data = SaliencyData(str(folder), side=8)
        data.setup("fit")
        data.sets["train"].__getitems__([0, 1])


def test_settings_of_scenes_are_refused_for_a_folder(folder):
    for name in ("images", "test_images"):
        with pytest.raises(UserError, match=f"data.{name} is 9, which only scenes have"):
            SaliencyData(str(folder), side=8, **{name: 9})


@pytest.mark.parametrize("wrong", [{"side": 60}, {"side": 32}, {"images": 0}, {"steps": 0}])
def test_mistakes_are_errors(wrong):
    with pytest.raises(UserError, match="data"):
        SaliencyData(**wrong)


def test_small_objects_stay(folder):
    for name in ("a", "b"):
        draw(folder / f"masks/00/{name}.png", (3, 3, 4, 4))
    data = SaliencyData(str(folder), side=8)
    data.setup("fit")
    assert np.array_equal(data.sets["train"].__getitems__([0]).masks.sum(dim=(2, 3)), [[1, 1]])
