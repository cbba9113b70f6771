import random

import numpy as np
import pytest
from PIL import Image

from unimoe.synthetic import salient_scenes as subject
from unimoe.synthetic.salient_scenes import (
    CANDIDATES,
    draw_scenes,
    plausible,
    preference,
    weight,
    with_candidates,
)


def square(side: int, row: int, column: int) -> np.ndarray:
    mask = np.zeros((16, 16), dtype=bool)
    mask[row : row + side, column : column + side] = True
    return mask


def test_larger_and_more_central_objects_weigh_more():
    assert weight(square(4, 6, 6)) == 16
    assert weight(square(4, 6, 0)) == pytest.approx(16 * (1 - 6 / 16))
    assert weight(square(2, 7, 7)) == 4


def test_salient_objects_are_plausible_alone_and_together():
    objects = [square(4, 6, 6), square(4, 6, 0), square(2, 0, 0)]  # weights 16, 10 and below 4
    masks, preferences = plausible(objects)
    assert len(masks) == 3 and masks[0].tolist() == objects[0].tolist()
    assert masks[2].tolist() == (objects[0] | objects[1]).tolist()
    assert preferences.tolist() == pytest.approx([1, 10 / 16, 13 / 16])
    alone, one = plausible(objects[:1])
    assert len(alone) == 1 and one.tolist() == [1]


def test_a_mask_is_preferred_as_the_plausible_one_that_it_is_like():
    masks, preferences = plausible([square(4, 6, 6), square(4, 6, 0)])
    assert preference(masks[1], masks, preferences) == pytest.approx(10 / 16)
    assert preference(np.zeros((16, 16), dtype=bool), masks, preferences) == 0
    half = masks[0] & (np.arange(16) < 8)
    assert preference(half, masks, preferences) == pytest.approx(1 / 2)


def test_candidates_are_of_every_quality():
    masks, preferences = plausible([square(4, 6, 6), square(4, 6, 0)])
    image = np.zeros((3, 16, 16), dtype=np.uint8)
    found = [with_candidates(image, masks, preferences, random.Random(seed)) for seed in range(50)]
    scores = np.concatenate([one.scores for one in found])
    assert len(scores) == 50 * CANDIDATES and scores.max() == 1 and scores.min() < 0.1
    assert 0.2 < scores.mean() < 0.8
    again = with_candidates(image, masks, preferences, random.Random(7))
    assert again.candidates.tolist() == found[7].candidates.tolist()
    for one in found:
        for mask, score in zip(one.candidates, one.scores, strict=True):
            assert score == pytest.approx(preference(mask, masks, preferences))


class Painter:
    """Draws every emoji as a grey square."""

    def sprite(self, char: str) -> Image.Image:
        return Image.new("RGBA", (40, 40), (ord(char) % 256,) * 3 + (255,))


def test_a_scene_is_a_function_of_its_number(monkeypatch):
    photos = {f"{number}.png": Image.new("RGB", (96, 96), (number * 20,) * 3) for number in range(5)}
    monkeypatch.setattr(subject, "default_part", lambda name: name)
    monkeypatch.setattr(subject, "open_artist", lambda path: Painter())
    monkeypatch.setattr(subject, "load_photos", lambda path: photos)
    one, two = draw_scenes("train", 2, 64)
    again = draw_scenes("train", 1, 64)[0]
    assert one.image.shape == (3, 64, 64) and one.image.tolist() == again.image.tolist()
    assert one.masks.tolist() == again.masks.tolist() and one.image.tolist() != two.image.tolist()
    assert draw_scenes("test", 1, 64)[0].image.tolist() != one.image.tolist()
