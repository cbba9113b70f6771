"""Values as annotation tools write them."""

import math

import pytest

from unimoe.detection.data.values import (
    parse_box,
    parse_class,
    parse_flag,
    parse_id,
    parse_number,
    parse_size,
)


def test_ids_are_numbers_or_text():
    assert [parse_id(value) for value in (7, 7.0, "7", " 7 ", "-7")] == [7, 7, 7, 7, -7]
    assert parse_id("im7") == "im7"
    for value in (None, "", [7], 7.5, True):
        with pytest.raises(ValueError, match="expected a whole number or a text"):
            parse_id(value)


def test_numbers_may_be_text():
    assert [parse_number(value) for value in (3, "3", "3.5", -1.0)] == [3, 3, 3.5, -1]
    assert [parse_number(value) for value in (None, "x", [3], True, math.nan, "inf")] == [None] * 6


def test_classes_may_be_decimals():
    assert [parse_class(value) for value in (0, "0", "0.0", 3.0, "3e0")] == [0, 0, 0, 3, 3]
    for value in ("0.5", None, "cat"):
        with pytest.raises(ValueError, match="expected a whole number"):
            parse_class(value)


def test_boxes_are_four_numbers():
    assert parse_box(["10", 5, 20.5, "30"], "x, y, width, height") == (10, 5, 20.5, 30)
    assert all(map(math.isnan, parse_box([1, 2, float("inf"), 4], "x, y, width, height")))
    for value in ([], [1, 2, 3], None, [1, 2, 3, None], {"x": 1}, "1234"):
        with pytest.raises(ValueError, match=r"expected 4 numbers \(x, y, width, height\)"):
            parse_box(value, "x, y, width, height")


def test_crowd_flags():
    assert [parse_flag(value) for value in (None, 0, 1, "0", "1", True, False, "true", "False")] == [
        False, False, True, False, True, True, False, True, False
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"iscrowd is \[\], expected 0 or 1"):
        parse_flag([])


def test_sizes_are_given_whole_or_not_at_all():
    assert parse_size({}) is None and parse_size({"width": None, "height": None}) is None
    assert parse_size({"width": 100.0, "height": "60"}) == (100, 60)
    for width, height in ((0, 0), (100, None), (-5, 5), ("wide", 5)):
        with pytest.raises(ValueError, match="expected the size of the image in pixels"):
            parse_size({"width": width, "height": height})
