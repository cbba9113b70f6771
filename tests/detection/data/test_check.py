"""``unimoe data check`` on boxes: what it finds, its exit status, and its JSON."""

import json
from pathlib import Path

import pytest
from PIL import Image

from unimoe.commands import main as cli
from unimoe.detection.data.check import check_detection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound COCO file with gaps in its ids and an image without objects."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 50)).save(tmp_path / name)
    size = {"width": 100, "height": 50}
    content = {
        "images": [{"id": 3, "file_name": "a.png", **size}, {"id": 70, "file_name": "b.png", **size}],
        "categories": [{"id": 2, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [{"id": 5, "image_id": 3, "category_id": 90, "bbox": [1, 2, 30, 40]}],
    }
    (tmp_path / "set.json").write_text(json.dumps(content))
    return tmp_path


def test_a_sound_file(folder: Path, capsys):
    assert cli.main(["data", "check", str(folder / "set.json")]) == 0
    out = capsys.readouterr().out
    assert "2 images, 1 boxes of 2 categories" in out and "no faults found" in out


def test_a_faulty_file(folder: Path, capsys):
    content = json.loads((folder / "set.json").read_text())
    box = {"id": 5, "image_id": 3, "category_id": 90}
    content["annotations"] += [
        {**box, "bbox": [90, 40, 30, 30]},
        {**box, "bbox": [1, 1, 0, 5]},
        {**box, "bbox": [1, 1, 5, 5], "image_id": 4},
        {**box, "bbox": [1, 1, 5, 5], "category_id": 1},
    ]
    content["images"] += [{"id": 4000, "file_name": "none.png"}, {"id": 71, "file_name": "broken.png"}]
    (folder / "broken.png").write_bytes(b"no picture")
    content["images"][1]["width"] = 90
    (folder / "set.json").write_text(json.dumps(content))
    assert cli.main(["data", "check", str(folder / "set.json"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {fault["kind"] for fault in report["faults"]} == {
        "outside", "empty box", "unknown image", "unknown category", "missing image", "unreadable image",
        "size", "duplicate annotation id",
    }  # fmt: skip
    assert cli.main(["data", "check", str(folder / "set.json"), "--no-decode", "--show", "1"]) == 1
    out = capsys.readouterr().out
    assert "two annotations have one id: 4 times" in out and "and 3 more (--show N)" in out
    assert "another size" not in out


def test_all_splits_of_yolo(tmp_path: Path):
    for split, label in (("train", "0 0.5 0.5 0.2 0.2"), ("val", "7 0.5 0.5 0.2 0.2\n0 1")):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / split / "a.png")
        (tmp_path / "labels" / split / "a.txt").write_text(label)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [cat, '']")
    report = check_detection(tmp_path)
    assert (report.images, report.boxes) == (2, 1)
    assert [fault.kind for fault in report.faults] == ["empty name", "unknown category", "malformed"]
    assert (
        "a.txt:2: expected a class and 4 numbers" in f"{report.faults[2].where}: {report.faults[2].message}"
    )


def test_not_a_file_of_boxes(tmp_path: Path, capsys):
    assert cli.main(["data", "check", str(tmp_path / "nothing.json")]) == 2
    assert "there is no data file" in capsys.readouterr().err


def test_a_test_set_is_told_from_conversations(folder: Path, capsys):
    content = json.loads((folder / "set.json").read_text())
    del content["annotations"]
    (folder / "set.json").write_text(json.dumps(content))
    assert cli.main(["data", "check", str(folder / "set.json")]) == 0
    assert "2 images, 0 boxes of 2 categories" in capsys.readouterr().out
