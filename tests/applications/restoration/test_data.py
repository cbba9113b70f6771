from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

from unimoe.applications.restoration import data as subject
from unimoe.applications.restoration.data import RestorationData
from unimoe.errors import UserError


def save(path: Path, size: tuple[int, int] = (33, 20), shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)
    return path


def test_photos_get_each_weather_in_turn(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    for name in ("astronaut", "chelsea", "brick", "camera"):
        Image.fromarray(random.integers(0, 255, (100, 120, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(subject, "default_part", lambda name: tmp_path)
    data = RestorationData(side=32, patches=9)
    data.setup("fit")
    assert data.weathers == ["rain", "haze", "snow"] and len(data.sets["train"]) == 9
    assert [len(data.sets[split].photos) for split in ("train", "val", "test")] == [2, 1, 1]
    batch = data.sets["train"].__getitems__([4, 0, 2])
    assert batch.index.tolist() == [4, 0, 2] and batch.weathers.tolist() == [1, 0, 2]
    assert batch.degraded.shape == batch.clear.shape == (3, 3, 32, 32)
    assert ((batch.degraded - batch.clear).abs().flatten(1).mean(dim=1) > 0.01).all()
    again = data.sets["train"].__getitems__([0])
    assert_close(again.degraded[0], batch.degraded[1], rtol=0, atol=0)
    assert not again.clear.equal(data.sets["test"].__getitems__([0]).clear)


def test_pairs_are_split_and_cut_at_one_place(weather):
    data = RestorationData(**weather["data"])
    data.setup("fit")
    assert data.weathers == ["haze", "rain"]
    pairs = [pair for one in data.sets.values() for pair in one.pairs]
    assert len({pair.degraded for pair in pairs}) == 24 and len(data.sets["val"].pairs) == 5
    assert len(data.sets["test"]) == 2 * len(data.sets["test"].pairs), "two tiles of 16 pixels in 33 x 20"
    assert 64 <= len(data.sets["train"]) < 64 + len(data.sets["train"].pairs)
    batch = data.sets["train"].__getitems__(list(range(30)))
    haze = batch.weathers == 0
    veiled = (batch.clear[haze] * 255 // 2 + 100) / 255
    assert_close(batch.degraded[haze], veiled.clamp(max=1), rtol=0, atol=1.5 / 255)


def test_a_scene_is_in_one_split_in_all_weathers(tmp_path):
    for weather in ("haze", "rain"):
        for place in range(30):
            for name in ("input", "gt"):
                save(tmp_path / name / weather / f"{place}.png")
    data = RestorationData(str(tmp_path), side=16, val_share=0.2, test_share=0.2)
    data.setup("fit")
    scenes = [sorted(pair.degraded.name for pair in one.pairs) for one in data.sets.values()]
    assert all(names[::2] == names[1::2] for names in scenes) and sum(map(len, scenes)) == 60
    assert not set(scenes[0]) & set(scenes[1]) and not set(scenes[0]) & set(scenes[2])


def test_patches_of_training_differ_and_tiles_do_not_overlap(tmp_path):
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None], (16, 96, 3))
    for name in ("input", "gt"):
        (tmp_path / name).mkdir()
        for place in range(3):
            Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / name / f"{place}.png")
    data = RestorationData(str(tmp_path), str(tmp_path), side=16, patches=30, val_share=0.0)
    data.setup("fit")
    lefts = data.sets["test"].__getitems__(list(range(18))).clear[:, 0, 0, 0] * 255
    assert lefts.round().int().tolist() == [0, 16, 32, 48, 64, 80] * 3
    found = data.sets["train"].__getitems__(list(range(30)))
    assert len(found.clear[:, 0, 0, 0].unique()) > 10 and found.clear.equal(found.degraded)
    assert data.weathers == [tmp_path.name], "without folders there is one"


def test_mistakes_are_errors(tmp_path, weather):
    def complaint(folder: Path, **settings) -> str:
        with pytest.raises(UserError) as error:
            RestorationData(str(folder), **{"side": 16, **settings}).setup("fit")
        return str(error.value)

    assert "has no folder input/, expected input/NAME.png and gt/NAME.png" in complaint(tmp_path / "none")
    (tmp_path / "a/input").mkdir(parents=True)
    assert "has no folder gt/" in complaint(tmp_path / "a")
    (tmp_path / "a/gt").mkdir()
    assert "a/input holds no images" in complaint(tmp_path / "a")
    save(tmp_path / "a/input/1.png")
    assert "a/gt/1.png is missing, the clear image of" in complaint(tmp_path / "a")
    save(tmp_path / "a/gt/1.png", (20, 33))
    assert "1.png has 33 x 20 pixels, but" in complaint(tmp_path / "a")
    save(tmp_path / "a/gt/1.png")
    assert "the val split of 1 images is empty; see data.val_share" in complaint(tmp_path / "a")
    assert "the test split of 1 images is empty; see data.test_share" in complaint(
        tmp_path / "a", val_share=0
    )
    for flag in ("val_share", "test_share"):
        with pytest.raises(UserError, match=f"data.{flag} is 0.2, but data.train is photos"):
            RestorationData(**{flag: 0.2})
    assert "has 33 x 20 pixels, expected at least data.side, 32" in complaint(tmp_path / "a", side=32)
    (tmp_path / "a/gt/1.png").write_text("no image")
    assert "1.png cannot be read as an image" in complaint(tmp_path / "a")
    assert "a sum below 1" in complaint(tmp_path / "a", val_share=0.9)
    assert "expected 16 and 1 or more" in complaint(tmp_path / "a", side=8)


def test_a_broken_file_is_named_when_it_is_read(tmp_path, weather):
    folder = Path(weather["data"]["train"])
    data = RestorationData(**weather["data"])
    data.setup("fit")
    broken = data.sets["train"].pairs[0].degraded
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 33, 3), dtype=np.uint8))
    noise.save(broken)
    broken.write_bytes(broken.read_bytes()[:400])
    with pytest.raises(UserError, match=f"{broken.name} cannot be read as an image"):
        data.sets["train"].__getitems__([0])
    assert broken.is_relative_to(folder)
