"""Augmentation keeps boxes on their objects."""

import numpy as np
import pytest
import torch
from PIL import Image

from unimoe.detection.data.transforms import Augment, AugmentConfig, Resize, fit_size


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
