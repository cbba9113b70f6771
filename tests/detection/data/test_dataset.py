"""Augmentation keeps boxes on their objects; prompts are drawn as they should be; batches hold together."""

import numpy as np
import pytest
import torch
from PIL import Image

from unimoe.detection.data.annotations import Category, DetectionSample, DetectionSet
from unimoe.detection.data.dataset import EvalDataset, TrainDataset
from unimoe.detection.data.sampling import PromptSampler, SamplingConfig
from unimoe.detection.data.transforms import Augment, AugmentConfig, Resize, fit_size

NAMES = ["cat", "dog", "red car", "tree", "mat"]


def picture_with_a_box(size=(90, 60), box=(20, 10, 50, 40)):
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), box)
    return picture, torch.tensor([box], dtype=torch.float32)


@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_boxes_stay_on_their_objects(crop):
    """A white rectangle is still in its box after flips, crops and resizing."""
    config = AugmentConfig(
        sizes=[40, 64], longest=80, crop=crop, crop_sizes=[50, 70], crop_range=(30, 50), colour=0.2
    )
    augment = Augment(config, mean=(0, 0, 0), std=(1, 1, 1))
    picture, boxes = picture_with_a_box()
    shapes, seen = set(), 0
    for _ in range(30):
        pixels, found, kept = augment(picture, boxes)
        shapes.add(tuple(pixels.shape[1:]))
        white = np.argwhere(pixels.amin(0).numpy() > 0.4)
        if not len(kept):
            assert len(white) < 80
            continue
        seen += 1
        (top, left), (bottom, right) = white.min(0), white.max(0) + 1
        assert found[0].tolist() == pytest.approx([left, top, right, bottom], abs=1.6)
    assert seen > 20 and len(shapes) > 1 and max(max(shape) for shape in shapes) <= 80


def test_no_flip_where_the_text_knows_sides():
    augment = Augment(AugmentConfig(sizes=[60], flip=1.0, crop=0.0))
    picture, boxes = picture_with_a_box()
    assert augment(picture, boxes)[1].tolist() == [[40, 10, 70, 40]]
    assert augment(picture, boxes, flip=False)[1].tolist() == [[20, 10, 50, 40]]


def test_sizes():
    assert fit_size(640, 480, 800, 1333) == [800, 1067]
    assert fit_size(2000, 500, 800, 1333) == [333, 1333]
    assert fit_size(1000, 1, 10, 100) == [1, 100]
    assert Resize(30, 40)(Image.new("RGB", (90, 60))).shape == (3, 27, 40)


def test_sampled_prompts_hold_what_is_there_and_some_that_is_not(tokenizer):
    sampler = PromptSampler(NAMES, tokenizer, SamplingConfig(negatives=2, full=0.5))
    lengths, orders = set(), set()
    for _ in range(40):
        prompt, names_M = sampler(torch.tensor([2, 0, 2]))
        assert [prompt.names[i] for i in names_M] == ["red car", "cat", "red car"]
        lengths.add(len(prompt.names))
        orders.add(tuple(prompt.names))
    assert lengths == {3, 4} and len(orders) > 5
    for _ in range(10):
        assert set(sampler(torch.tensor([0]), absent=[3])[0].names) == {"cat", "tree"}
        assert "dog" not in sampler(torch.tensor([0]), present=[1])[0].names
        assert len(sampler(torch.tensor([], dtype=torch.int64))[0].names) in (1, 2)
        assert len(sampler(torch.tensor([], dtype=torch.int64), absent=[])[0].names) == 1


def test_names_that_do_not_fit_lose_their_objects(tokenizer):
    """Room for two short names: [CLS] a . b . [SEP]"""
    sampler = PromptSampler(NAMES, tokenizer, SamplingConfig(max_tokens=6))
    dropped = set()
    for _ in range(20):
        prompt, names_M = sampler(torch.tensor([0, 1, 3]))
        assert len(prompt.input_ids) <= 6 and (names_M >= 0).sum() == 2
        dropped.add(int((names_M < 0).nonzero()))
    assert dropped == {0, 1, 2}


def test_one_of_several_names_is_asked_for(tokenizer):
    sampler = PromptSampler(["cat/dog", "tree"], tokenizer, SamplingConfig(negatives=0))
    assert {sampler(torch.tensor([0]))[0].names[0] for _ in range(20)} == {"cat", "dog"}


@pytest.fixture
def data(tmp_path) -> DetectionSet:
    """Classes with a crowd, a caption, and an image of nothing; sizes differ."""
    samples = []
    for i, (size, facts) in enumerate(
        [
            ((90, 60), {}),
            ((60, 60), {"caption": "a dog on the left of a tree", "spans": (((2, 5),), ((21, 27),))}),
            ((60, 90), {}),
        ]
    ):
        picture, boxes = picture_with_a_box(size)
        picture.save(tmp_path / f"{i}.png")
        boxes, rows, crowd = (boxes.repeat(2, 1), [2 if not i else 0, 1], [False, not i])
        if i == 2:
            boxes, rows, crowd = boxes[:0], [], []
        samples.append(
            DetectionSample(
                tmp_path / f"{i}.png", i, f"image {i}", boxes, torch.tensor(rows, dtype=torch.int64),
                torch.tensor(crowd, dtype=torch.bool), size, **facts,
            )
        )  # fmt: skip
    return DetectionSet(tmp_path / "set.jsonl", samples, [Category(i, name) for i, name in enumerate(NAMES)])


def test_training_batches(data, tokenizer):
    augment = Augment(AugmentConfig(sizes=[60], crop=0.0, flip=0.0))
    dataset = TrainDataset(data, augment, PromptSampler(NAMES, tokenizer))
    batch = TrainDataset.collate([dataset[i, 7] for i in range(3)])
    assert batch.pixel_values.shape == (3, 3, 90, 90)
    assert batch.pixel_mask.sum(dim=(1, 2)).tolist() == [90 * 60, 60 * 60, 60 * 90]
    crowded, caption, empty = batch.targets
    torch.testing.assert_close(crowded.boxes_M4, torch.tensor([[35 / 90, 25 / 60, 30 / 90, 0.5]]))
    assert batch.prompts[0].names[crowded.names_M[0]] == "red car" and "dog" not in batch.prompts[0].names
    assert caption.names_M.tolist() == [0, 1] and batch.prompts[1].names == ["dog", "a tree"]
    assert empty.boxes_M4.shape == (0, 4) and empty.names_M.shape == (0,)
    assert all(
        rows.shape[1] == batch.prompt_batch.input_ids.shape[1] for rows in batch.prompt_batch.name_tokens
    )


def test_evaluation_batches(data):
    dataset = EvalDataset(data, Resize(30, 100))
    batch = dataset.collate([dataset[i] for i in range(3)])
    assert batch.sizes == [(90, 60), (60, 60), (60, 90)] and batch.pixel_values.shape == (3, 3, 45, 45)
    assert batch.pixel_mask[0].sum() == 45 * 30 and [s.image_id for s in batch.samples] == [0, 1, 2]
