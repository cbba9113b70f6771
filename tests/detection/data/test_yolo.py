"""YOLO's folders as Roboflow and others write them."""

import pytest
from PIL import Image

from unimoe.detection.data.check import check_detection
from unimoe.detection.data.yolo import read_yolo, yolo_splits
from unimoe.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "valid"):
        for kind in ("images", "labels"):
            (tmp_path / split / kind).mkdir(parents=True)
        Image.new("RGB", (100, 50)).save(tmp_path / split / "images" / "a.png")
        (tmp_path / split / "labels" / "a.txt").write_text("\ufeff0.0 0.2 0.4 0.2 0.6\n", encoding="utf-8")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: [cat]")
    return tmp_path


def test_roboflows_folders_and_decimal_classes(folder):
    for split in ("train", "val"):
        data = read_yolo(folder / "data.yaml", split=split)
        assert data.faults == [] and data.samples[0].boxes_M4.tolist() == [[10, 5, 30, 35]]
    assert check_detection(folder).faults == []


def test_valid_is_val(folder):
    (folder / "data.yaml").write_text("train: train/images\nvalid: valid\\images\nnames: [cat]")
    assert yolo_splits(folder / "data.yaml") == ["train", "val"]
    assert len(read_yolo(folder / "data.yaml", split="val").samples) == 1
    (folder / "data.yaml").write_text("names: [cat]")
    with pytest.raises(UserError, match="has none of train, val, test"):
        check_detection(folder)


def test_images_of_every_format(folder):
    images = folder / "train" / "images"
    Image.new("RGB", (100, 50)).save(images / "b.avif")
    Image.new("RGB", (100, 50)).save(images / "c.unknown", "PNG")
    (images / "notes.txt").write_text("no image")
    names = [sample.path.name for sample in read_yolo(folder / "data.yaml").samples]
    assert names == ["a.png", "b.avif", "c.unknown"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 50 20 10 8", "look like pixels"),
        ("0.5 0.2 0.2 0.1 0.1", "expected a whole number"),
        ("0 0.2 0.2 0.1", "expected a class and 4 numbers"),
        ("cat 0.2 0.2 0.1 0.1", "found the class 'cat'"),
    ],
)
def test_lines_that_are_none(folder, line, message):
    (folder / "train" / "labels" / "a.txt").write_text(line)
    (fault,) = read_yolo(folder / "data.yaml").faults
    assert fault.kind == "malformed" and message in fault.message
