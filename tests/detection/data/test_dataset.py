"""Batches of views and of whole images."""

import pytest
import torch
from PIL import Image

from unimoe.detection.data.annotations import Category, DetectionSample, DetectionSet
from unimoe.detection.data.dataset import EvalDataset, TrainDataset
from unimoe.detection.data.sampling import PromptSampler
from unimoe.detection.data.transforms import Augment, AugmentConfig, Resize
from unimoe.errors import UserError

NAMES = ["cat", "dog", "red car", "tree", "mat"]


def picture_with_a_box(size=(90, 60), box=(20, 10, 50, 40)):
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), box)
    return picture, torch.tensor([box], dtype=torch.float32)


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
    assert batch.pixel_mask[0].sum() == 45 * 30 and batch.rows == [0, 1, 2]


def test_an_unreadable_image_is_left_out_or_an_error(data, tmp_path, caplog):
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="image 1"):
        EvalDataset(data, Resize(30, 100))[1]
    dataset = EvalDataset(data, Resize(30, 100), skip_unreadable=True)
    batch = dataset.collate([dataset[i] for i in range(3)])
    assert batch.rows == [0, 2] and batch.sizes == [(90, 60), (60, 90)] and "image 1" in caplog.text
    assert dataset.collate([None]).rows == []
