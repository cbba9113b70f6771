"""Stored maps in place of images: the same boxes and prompts, and the backbone's maps to half precision."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_convert

from unimoe.detection.data.cached import CachedEvalDataset, CachedTrainDataset
from unimoe.detection.data.dataset import EvalDataset, TrainDataset
from unimoe.detection.data.formats import read_detection
from unimoe.detection.data.sampling import PromptSampler
from unimoe.detection.data.transforms import Augment, AugmentConfig, Resize


@pytest.fixture
def data(world, tokenizer) -> TrainDataset:
    """The eight images of 64 x 64 pixels, made smaller and mirrored now and then."""
    found = read_detection(world / "train.json")
    augment = Augment(AugmentConfig(sizes=[48], longest=64, crop=0.0, flip=0.5))
    return TrainDataset(found, augment, PromptSampler(found.names, tokenizer))


def test_every_copy_is_a_view_of_its_own_with_the_boxes_of_that_view(data, tiny_detector, tmp_path):
    model = tiny_detector().eval()
    cached = CachedTrainDataset.of(data, 3, tmp_path, model)
    assert len(cached) == 24
    for index in (1, 9, 17):  # the same image three times
        with torch.random.fork_rng():
            torch.manual_seed(index)
            view = data.view(data.data.samples[1])
        _, prompt, target = cached[index, 5]
        width, height = view.pixels.shape[2], view.pixels.shape[1]
        scale_4 = torch.tensor([width, height, width, height])
        assert_close(box_convert(target.boxes_M4, "cxcywh", "xyxy") * scale_4, view.boxes_K4)
        assert [prompt.names[i] for i in target.names_M] == [
            data.data.names[i] for i in data.data.samples[1].category_M
        ]
        pixels = torch.zeros(1, 3, 64, 64)
        pixels[0, :, :height, :width] = view.pixels
        batch = cached.collate([cached[index, 5]])
        assert batch.pixel_values is None and batch.pixel_mask.sum() == 48 * 48
        with torch.no_grad():
            expected = model.encode_image(pixels)
        for found, level in zip(batch.image_features, expected, strict=True):
            assert_close(found, level, atol=2e-3, rtol=2e-3)
    centres = {round(cached[index, 5][2].boxes_M4[0, 0].item(), 4) for index in range(1, 24, 8)}
    assert len(centres) == 2, "mirrored in one of the copies, and not in another"


def test_the_prompt_follows_from_the_seed_and_disturbs_no_other_draw(data, tiny_detector, tmp_path):
    cached = CachedTrainDataset.of(data, 1, tmp_path, tiny_detector())
    state = torch.get_rng_state()
    asked = [tuple(cached[0, seed][1].names) for seed in (3, 3, *range(10))]
    assert asked[0] == asked[1] == asked[5] and len(set(asked)) > 2
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_are_computed_again_for_other_views_only(data, tiny_detector, tmp_path, monkeypatch):
    model = tiny_detector().eval()
    CachedTrainDataset.of(data, 1, tmp_path, model)
    encode, calls = model.encode_image, []
    monkeypatch.setattr(model, "encode_image", lambda *given: calls.append(1) or encode(*given))
    CachedTrainDataset.of(data, 1, tmp_path, model)
    assert not calls
    CachedTrainDataset.of(data, 2, tmp_path, model)
    assert calls == [1]


def test_whole_images_keep_the_size_that_their_boxes_are_given_in(data, tiny_detector, tmp_path):
    images = EvalDataset(data.data, Resize(32, 40))
    model = tiny_detector().eval()
    cached = CachedEvalDataset.of(images, tmp_path, model)
    assert len(cached) == 8 and cached[6] == 6
    batch = cached.collate([6, 2])
    assert batch.rows == [6, 2] and batch.sizes == [(64, 64)] * 2
    assert batch.pixel_mask.sum(dim=(1, 2)).tolist() == [32 * 32] * 2
    pixels = torch.zeros(1, 3, 40, 40)
    pixels[0, :, :32, :32] = images[2][1]
    with torch.no_grad():
        for found, level in zip(batch.image_features, model.encode_image(pixels), strict=True):
            assert_close(found[1:], level, atol=2e-3, rtol=2e-3)
