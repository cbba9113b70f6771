"""Every format becomes the same samples, and what is wrong with a file is named."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from unimoe.detection.data.formats import read_detection
from unimoe.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (100, 50)).save(tmp_path / "images" / name)
    return tmp_path


def coco(**changes) -> dict:
    """Two images, categories with gaps, a crowd; the second image is empty."""
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 100, "height": 50},
            {"id": 9, "file_name": "b.png", "width": 100, "height": 50},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 90, "name": "red_car"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10, 5, 20, 30], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 100, 50], "iscrowd": 1},
        ],
    }
    return {**content, **changes}


def write(folder: Path, content: dict, name: str = "set.json") -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder / name


def faults(path: Path) -> dict[str, str]:
    return {
        fault.kind: f"{fault.where}: {fault.message}" for fault in read_detection(path, strict=False).faults
    }


def test_coco(folder: Path):
    data = read_detection(write(folder, coco()))
    first, second = data.samples
    assert (first.path, first.image_id, first.size) == (folder / "images" / "a.png", 7, (100, 50))
    assert first.boxes_M4.tolist() == [[10, 5, 30, 35], [0, 0, 100, 50]]
    assert [data.names[row] for row in first.category_M] == ["red_car", "cat"]
    assert first.crowd_M.tolist() == [False, True]
    assert second.boxes_M4.shape == (0, 4) and second.category_M.dtype == torch.int64
    assert data.ground_truth() == coco()


def test_lvis(folder: Path):
    content = coco()
    content["categories"][0]["frequency"] = "r"
    content["images"] = [
        {"id": 7, "coco_url": "x/images/a.png", "width": 100, "height": 50, "neg_category_ids": [1]}
    ]
    for entry in content["annotations"]:
        del entry["iscrowd"]
    data = read_detection(write(folder, content))
    assert data.samples[0].path == folder / "images" / "a.png"
    assert data.samples[0].negatives == (0,) and data.categories[0].frequency == "r"


def test_odvg(folder: Path):
    size = {"height": 50, "width": 100}
    instances = [{"bbox": [10, 5, 30, 35], "label": 3, "category": "red car"}]
    regions = [
        {"bbox": [[1, 2, 30, 40], [5, 5, 9, 9]], "phrase": "Two cats", "tokens_positive": [[0, 3], [4, 8]]},
        {"bbox": [10, 5, 30, 35], "phrase": "a mat"},
    ]
    lines = [
        {"filename": "a.png", **size, "detection": {"instances": instances}},
        {"filename": "b.png", **size, "grounding": {"caption": "Two cats on a mat", "regions": regions}},
    ]
    path = folder / "set.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    data = read_detection(path)
    classes, caption = data.samples
    assert classes.boxes_M4.tolist() == [[10, 5, 30, 35]] and data.categories[0].id == 3
    assert caption.category_M.tolist() == [0, 0, 1] and caption.caption == "Two cats on a mat"
    assert caption.spans == (((0, 3), (4, 8)), ((12, 17),))
    with pytest.raises(UserError, match="captions cannot be evaluated"):
        data.ground_truth()


@pytest.mark.parametrize("name", ["set_label_map.json", "label_map.json"])
def test_odvg_with_a_label_map(folder: Path, name):
    """Classes that no object has are there too, to be asked for as absent; ids may have gaps."""
    (folder / name).write_text('{"0": "cat", "3": "red car", "9": "dog"}')
    line = {"filename": "a.png", "detection": {"instances": [{"bbox": [1, 2, 3, 4], "label": 3}]}}
    path = folder / "set.jsonl"
    path.write_text(json.dumps(line))
    data = read_detection(path)
    assert [(one.id, one.name) for one in data.categories] == [(0, "cat"), (3, "red car"), (9, "dog")]
    assert data.samples[0].category_M.tolist() == [1]
    path.write_text(json.dumps(line).replace('"label": 3', '"label": 4'))
    with pytest.raises(
        UserError, match="line 1: an object has no category, and its label 4 is in no label map"
    ):
        read_detection(path)
    (folder / name).write_text("[1]")
    with pytest.raises(UserError, match="label_map.json: expected a label map such as"):
        read_detection(path)


def test_yolo(folder: Path):
    """Boxes and polygons, an image without labels, and a path of another machine."""
    (folder / "labels").mkdir()
    (folder / "labels" / "a.txt").write_text("1 0.2 0.4 0.2 0.6\n0 0.1 0.2 0.3 0.2 0.2 0.8\n\n")
    (folder / "data.yaml").write_text("path: /nowhere/at/all\ntrain: images\nnames: {0: cat, 1: red car}")
    data = read_detection(folder)
    torch.testing.assert_close(
        data.samples[0].boxes_M4, torch.tensor([[10.0, 5.0, 30.0, 35.0], [10.0, 10.0, 30.0, 40.0]])
    )
    assert data.names == ["cat", "red car"] and data.samples[0].category_M.tolist() == [1, 0]
    assert len(data.samples[1].boxes_M4) == 0
    truth = data.ground_truth()
    assert truth["annotations"][0]["bbox"] == pytest.approx([10, 5, 20, 30]) and len(truth["images"]) == 2
    with pytest.raises(UserError, match="has no 'val'"):
        read_detection(folder, split="val")


def test_boxes_are_repaired_and_that_is_said(folder: Path, caplog):
    boxes = [[90, 40, 30, 30], [5, 5, 0, 9], [200, 5, 9, 9], [0, 0, 100.3, 50], [5, 5, 9, float("nan")]]
    annotations = [{"id": 1, "image_id": 7, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
    path = write(folder, coco(annotations=annotations))
    data = read_detection(path)
    assert data.samples[0].boxes_M4.tolist() == [[90, 40, 100, 50], [0, 0, 100, 50]]
    kinds = [fault.kind for fault in data.faults]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "outside": 1, "empty box": 3, "duplicate annotation id": 4
    }  # fmt: skip
    assert "3 times a box has no area inside its image; repaired" in caplog.text
    assert (
        "found (x1, y1, x2, y2) = [90.0, 40.0, 120.0, 70.0], expected one inside 100 x 50"
        in faults(path)["outside"]
    )


def categories(*pairs) -> list[dict]:
    return [{"id": id, "name": name} for id, name in pairs]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("missing image", {"images": [{"id": 7, "file_name": "no.png"}]}, "no image .*no.png"),
        ("unknown image", {"images": []}, r"annotations\[0\]: there is no image with the id 7"),
        ("unknown category", {"categories": [{"id": 1, "name": "cat"}]}, "no category with the id 90"),
        (
            "duplicate category id",
            {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]},
            "'b' has the",
        ),
        (
            "empty name",
            {"categories": [{"id": 1, "name": "_(x)"}, {"id": 90, "name": "b"}]},
            "expected words",
        ),
        ("duplicate image id", {"images": coco()["images"][:1] * 2}, "image id 7 is used twice"),
        ("malformed", {"annotations": [{"id": 1, "image_id": 7}]}, r"annotations\[0\]: 'bbox' is missing"),
    ],
)
def test_what_cannot_be_repaired(folder: Path, kind, change, message):
    path = write(folder, coco(**change))
    assert kind in faults(path)
    with pytest.raises(UserError, match=message):
        read_detection(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "[]", "not a COCO file"),
        ("x.json", "{", "not JSON"),
        ("x.txt", "", "expected COCO or LVIS .json"),
        ("x.yaml", "a: [", "not YAML"),
        ("x.yaml", "train: images", "expected names"),
        ("x.yaml", "train: images\nnames: {cat: 1}", r"names\[cat\]: found the class"),
        ("x.yaml", "train: nowhere\nnames: [a]", "no such folder of images"),
        ("x.jsonl", "", "holds no images"),
    ],
)
def test_files_that_are_something_else(folder: Path, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_detection(folder / name)
    with pytest.raises(UserError, match="there is no file"):
        read_detection(folder / "nothing.json")


def test_pictures_of_every_kind_as_their_boxes_mean_them(folder: Path):
    """Grey, transparent, and turned by EXIF: upright, unless the file says the size before turning."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    images = folder / "images"
    Image.new("L", (100, 50), 9).save(images / "grey.png")
    Image.new("RGBA", (100, 50), (0, 0, 0, 0)).save(images / "clear.png")
    Image.new("RGB", (100, 50)).save(images / "turned.jpg", exif=exif)
    sizes = {"grey.png": (100, 50), "clear.png": (100, 50), "turned.jpg": (50, 100)}
    entries = [
        {"id": i, "file_name": name, "width": size[0], "height": size[1]}
        for i, (name, size) in enumerate([*sizes.items(), ("turned.jpg", (100, 50))])
    ]
    data = read_detection(write(folder, coco(images=entries, annotations=[])))
    for sample in data.samples:
        picture = sample.load()
        assert picture.mode == "RGB" and picture.size == sample.size
    assert data.samples[1].load().getpixel((0, 0)) == (255, 255, 255)
