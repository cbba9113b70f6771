"""Sizes and names that do not fit, and files that lie elsewhere."""

import pytest
from PIL import Image

from unimoe.detection.data.annotations import Category, DetectionSet, check_box_format, find_file
from unimoe.errors import UserError


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (200, 80)).save(tmp_path / "a.png")
    return DetectionSet(tmp_path / "set.json")


@pytest.mark.parametrize("size", [(80, 200), (100, 40), (640, 480)])
def test_a_size_that_is_not_the_images_stops_before_training(data, tmp_path, size):
    data.add(tmp_path / "a.png", 1, "image 1", [[1, 1, 40, 40]], [0], size=size)
    expected = rf"image 1: found 200 x 80 pixels, the file says {size[0]} x {size[1]}; correct the file"
    with pytest.raises(UserError, match=expected):
        data.check_sizes()
    with pytest.raises(UserError, match=expected):
        data.samples[0].load()
    assert data.samples[0].decode().size == (200, 80)


@pytest.mark.parametrize("size", [None, (200, 80), (199, 81)])
def test_a_size_that_is_near_or_unknown_is_fine(data, tmp_path, size):
    data.add(tmp_path / "a.png", 1, "image 1", [[1, 1, 40, 40]], [0], size=size)
    data.check_sizes()
    assert data.samples[0].load().size == (200, 80)


def test_one_name_twice_is_a_fault(data):
    data.categories += [Category(3, "cat"), Category(4, "Cat "), Category(5, "bow_(weapon)")]
    data.categories.append(Category(6, "Bow (ribbon)"))
    data.rows_by_id()
    (fault,) = data.faults
    assert fault.kind == "same name" and "'Cat ' is the same name as 'cat' of category 3" in fault.message


def test_files_of_another_machine(tmp_path):
    (tmp_path / "train" / "images").mkdir(parents=True)
    (tmp_path / "train" / "images" / "a.png").touch()
    wanted = tmp_path / "train" / "images"
    assert find_file("../train/images", [tmp_path], folder=True) == wanted
    assert find_file("train\\images\\a.png", [tmp_path]) == wanted / "a.png"
    assert find_file("D:\\sets\\train\\images\\a.png", [tmp_path]) == wanted / "a.png"
    (tmp_path / "a.png").touch()
    assert find_file("/elsewhere/other/a.png", [tmp_path]) is None, "a bare name could be any image"


def test_corner_boxes_that_are_sizes():
    size = (100, 60)
    assert check_box_format([((50, 20, 10, 10), size), ((60, 30, 20, 15), size)], corners=True)
    assert check_box_format([((10, 20, 50, 30), size), ((60, 30, 80, 45), size)], corners=True) is None
    assert check_box_format([((10, 20, 50, 30), None)], corners=False) is None
    assert check_box_format([], corners=False) is None
