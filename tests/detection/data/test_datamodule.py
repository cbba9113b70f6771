"""Which samples a step sees, and files that cannot be trained on."""

import json

import pytest
import torch
from PIL import Image

from unimoe.detection.data.datamodule import DetectionData, SeededSampler, eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.errors import UserError


def test_each_split_may_have_a_folder_of_pictures(world, tmp_path):
    copy = tmp_path / "val.json"
    copy.write_text((world / "val.json").read_text())
    data = DetectionData(str(world / "train.json"), str(copy), images={"val": str(world)})
    data.setup("fit")
    assert data.sets["val"].samples[0].path == data.sets["train"].samples[0].path == world / "0.png"
    with pytest.raises(UserError, match="data.images has 'vall', expected train, val and test"):
        DetectionData("x.json", images={"vall": "y"})


def sampler(world_size: int = 1, rank: int = 0) -> SeededSampler:
    return SeededSampler(["image"] * 7, 4 // world_size, seed=5, world_size=world_size, rank=rank, steps=6)


def test_two_ranks_draw_what_one_draws():
    """Every image with the same seed, whichever rank it comes to."""
    whole = list(sampler())
    first, second = list(sampler(2, 0)), list(sampler(2, 1))
    assert len(whole) == len(first) == len(second) == 6
    for step, pairs in enumerate(whole):
        assert first[step] == pairs[::2] and second[step] == pairs[1::2]
    seeds = [seed for pairs in whole for _, seed in pairs]
    assert len(set(seeds)) == len(seeds), "an image gets another prompt each time it comes"


def test_a_resumed_run_draws_what_the_whole_one_does():
    resumed = sampler()
    resumed.load_state_dict(sampler().state_dict(consumed=4))
    assert list(resumed) == list(sampler())[4:]


def test_numbers_that_are_none(caplog):
    for name in ("steps", "batch_size", "copies"):
        with pytest.raises(UserError, match="data.steps, data.batch_size and data.copies must be at least 1"):
            DetectionData("x.json", **{name: 0})
    DetectionData("x.json", copies=2)
    assert "data.copies is 2, which has no effect without data.cache_features" in caplog.text


def test_files_that_cannot_be_used(world, tmp_path):
    data = DetectionData(str(world / "train.json"))
    with pytest.raises(UserError, match="data.test names no file; `unimoe test` needs one"):
        data.setup("test")
    nothing = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "none.json").write_text(json.dumps(nothing))
    with pytest.raises(UserError, match="none.json: the file holds no images"):
        DetectionData(str(tmp_path / "none.json")).setup("fit")


def test_whole_images_in_order_or_as_chosen(world, tiny_detector):
    model, data = tiny_detector(image_size=64), read_detection(world / "val.json")
    assert [batch.rows for batch in eval_dataloader(data, model, batch_size=3)] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7],
    ]
    (batch,) = eval_dataloader(data, model, chosen=[5, 0])
    assert batch.rows == [5, 0] and batch.pixel_values.shape == (2, 3, 64, 64)
    with Image.open(data.samples[5].path) as image:
        corner = torch.tensor(image.getpixel((0, 0))) / 255
    mean, std = (torch.tensor(each) for each in (model.config.image_mean, model.config.image_std))
    torch.testing.assert_close(batch.pixel_values[0, :, 0, 0], (corner - mean) / std)
