"""Images and videos show what their ground truth says."""

import random

import numpy as np
import pytest
from PIL import Image

from unimoe.errors import UserError
from unimoe.synthetic.concepts import TRAINED, Concept
from unimoe.synthetic.extended import DIRECTIONS
from unimoe.synthetic.scenes import (
    FRAMES,
    SIZE,
    colour_word,
    moving,
    one_after_another,
    pair,
    several,
    single,
)


def redness(frame):
    """Centre of what is red."""
    pixels = np.asarray(frame).astype(int)
    y, x = np.nonzero(pixels[..., 0] > pixels[..., 1] + 60)
    return x.mean(), y.mean()


@pytest.mark.parametrize("way", DIRECTIONS)
def test_things_move_where_the_answer_says(artist, photo, way):
    frames = moving(TRAINED[0], way, artist, photo, random.Random(3))
    assert len(frames) == FRAMES
    (x0, y0), (x1, y1) = redness(frames[0]), redness(frames[-1])
    moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
    assert max(moved, key=lambda name: moved[name]) == way


def test_one_thing_after_another(artist, photo):
    frames = one_after_another(TRAINED[0], TRAINED[1], artist, photo, random.Random(5))
    steps = [
        np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean()
        for a, b in zip(frames, frames[1:], strict=False)
    ]
    change = int(np.argmax(steps))
    assert len(frames) == FRAMES and 2 <= change <= FRAMES - 4 and steps[change] > 2 * sorted(steps)[-2]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_copies_of_a_sprite_do_not_overlap(artist, photo, count):
    scene = several(TRAINED[0], count, artist, photo, random.Random(count))
    assert scene.image.size == (SIZE, SIZE) and scene.shown == [TRAINED[0]] * count
    red = np.asarray(scene.image).astype(int)
    red = red[..., 0] > red[..., 1] + 60
    quarters = [part.any() for half in np.split(red, 2) for part in np.split(half, 2, axis=1)]
    assert sum(quarters) == count


def test_a_pair_is_named_from_left_to_right(artist, photo):
    left, right = TRAINED[:2]
    assert pair(left, right, artist, photo, random.Random(0)).shown == [left, right]


def test_regions_hold_the_sprites_and_the_empty_quarters(artist, photo):
    scene = several(TRAINED[0], 3, artist, photo, random.Random(4))
    red = np.asarray(scene.image).astype(int)
    red = red[..., 0] > red[..., 1] + 60
    named = dict.fromkeys(name for name, _ in scene.regions)
    assert list(named) == ["nothing", TRAINED[0].name] and len(scene.regions) == 4
    for name, box in scene.regions:
        x0, y0, x1, y1 = (round(edge * SIZE) for edge in box)
        assert red[y0:y1, x0:x1].any() == (name != "nothing")
        red[y0:y1, x0:x1] = False
    assert not red.any()
    left, right = pair(TRAINED[0], TRAINED[1], artist, photo, random.Random(0)).regions
    assert left[1][2] <= 0.5 <= right[1][0]


def test_the_same_seed_gives_the_same_image(artist, photo):
    one, same, other = (single(TRAINED[0], artist, photo, random.Random(seed)).image for seed in (1, 1, 2))
    assert one.tobytes() == same.tobytes() != other.tobytes()


def test_a_colour_is_named_only_if_it_dominates():
    assert colour_word(Image.new("RGBA", (8, 8), (255, 0, 0, 255))) == "red"
    halves = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    halves.paste((0, 0, 255, 255), (0, 0, 4, 8))
    assert colour_word(halves) is None


def test_a_missing_drawing_is_an_error(artist, photo):
    nothing = Concept("\u0394", *[getattr(TRAINED[0], name) for name in list(vars(TRAINED[0]))[1:]])
    with pytest.raises(UserError, match=r"has no drawing of .* \(U\+394\)"):
        single(nothing, artist, photo, random.Random(0))
