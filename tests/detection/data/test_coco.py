"""COCO files as tools write them mean the same to training and to evaluation."""

import json

import pytest
from PIL import Image

from unimoe.detection.data.coco import parse_coco, read_coco
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.average_precision import evaluate_coco
from unimoe.errors import UserError

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30], "area": 900, "iscrowd": 0}
FOUND = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30], "score": 0.9}


def content(*annotations, **changes):
    image = {"id": 1, "file_name": "a.png", "width": 100, "height": 60}
    whole = {"images": [image], "categories": [{"id": 1, "name": "cat"}], "annotations": list(annotations)}
    return {**whole, **changes}


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (100, 60)).save(tmp_path / "a.png")

    def write(value, name="set.json"):
        (tmp_path / name).write_text(json.dumps(value))
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    "change",
    [
        {"area": None},
        {"area": "900"},
        {"area": [900]},
        {"iscrowd": None},
        {"iscrowd": "0"},
        {"bbox": ["10", "10", "30", "30"]},
        {"id": None},
        {"image_id": "1", "category_id": 1.0},
    ],
)
def test_one_box_however_it_is_written(write, change):
    entry = {**BOX, **change}
    (sample,) = read_detection(write(content(entry))).samples
    assert sample.boxes_M4.tolist() == [[10, 10, 40, 40]] and sample.crowd_M.tolist() == [False]
    scores = evaluate_coco(content(entry), [FOUND])
    assert scores.metrics["AP"] == pytest.approx(1) and scores.classes[0].objects == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": []}, r"annotations\[0\]: bbox is \[\], expected 4 numbers"),
        ({"bbox": None}, r"annotations\[0\]: 'bbox' is missing"),
        ({"image_id": [1]}, r"annotations\[0\]: found the id \[1\]"),
        ({"iscrowd": "maybe"}, "iscrowd is 'maybe', expected 0 or 1"),
    ],
)
def test_what_cannot_be_read_is_named_by_both(write, change, message):
    wrong = content({**BOX, **change})
    with pytest.raises(UserError, match=message):
        read_detection(write(wrong))
    with pytest.raises(UserError, match=message):
        evaluate_coco(wrong, [FOUND])


def test_ids_may_be_text(write):
    entry = {**BOX, "image_id": "im1", "category_id": "c"}
    images = [{"id": "im1", "file_name": "a.png"}]
    truth = content(entry, images=images, categories=[{"id": "c", "name": "cat"}])
    data = read_detection(write(truth))
    assert data.samples[0].image_id == "im1" and data.categories[0].id == "c"
    scores = evaluate_coco(truth, [{**FOUND, "image_id": "im1", "category_id": "c"}])
    assert scores.metrics["AP"] == pytest.approx(1) and scores.classes[0].id == "c"


def test_boxes_without_area_and_unlisted_ones_do_not_count(caplog):
    truth = content(
        BOX,
        {**BOX, "id": 2, "bbox": [50, 20, 0, 20]},
        {**BOX, "id": 3, "image_id": 7},
        {**BOX, "category_id": 9},
    )
    scores = evaluate_coco(truth, [FOUND])
    assert scores.metrics["AP"] == pytest.approx(1) and scores.classes[0].objects == 1
    assert "1 boxes without area are left out" in caplog.text and "2 annotations of unlisted" in caplog.text


def test_a_test_set_has_no_annotations(write):
    for missing in ({}, {"annotations": None}):
        whole = {key: value for key, value in content().items() if key != "annotations"} | missing
        data = read_detection(write(whole))
        assert not data.annotated and len(data.samples) == 1 and data.samples[0].boxes_M4.shape == (0, 4)
    assert read_detection(write(content())).annotated, "a set without objects is annotated"


@pytest.mark.parametrize(
    ("size", "known"),
    [
        ({"width": None, "height": None}, None),
        ({"width": 0, "height": 0}, None),
        ({"width": 100}, None),
        ({"width": 100.0, "height": "60"}, (100, 60)),
    ],
)
def test_a_size_that_is_none_is_not_believed(write, size, known):
    data = read_detection(write(content(BOX, images=[{"id": 1, "file_name": "a.png", **size}])))
    assert data.samples[0].size == known and data.samples[0].boxes_M4.tolist() == [[10, 10, 40, 40]]


def test_a_root_category_is_not_asked_for(write):
    names = [{"id": 0, "name": "objects", "supercategory": "none"}]
    names += [{"id": 1, "name": "cat", "supercategory": "objects"}]
    assert read_detection(write(content(BOX, categories=names))).names == ["cat"]
    person = [{"id": 1, "name": "person", "supercategory": "person"}]
    assert read_detection(write(content(BOX, categories=person))).names == ["person"]
    with pytest.raises(UserError, match="found an empty list, expected the classes"):
        read_detection(write(content(categories=[])))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0.1, 0.17, 0.3, 0.5], [0, 0, 1, 1]], "all 2 boxes lie between 0 and 1"),
        (
            [[60, 10, 95, 55], [70, 30, 99, 58]],
            r"look like \(x1, y1, x2, y2\), expected \(x, y, width, height\)",
        ),
    ],
)
def test_boxes_of_another_format_are_not_trained_on(write, boxes, message):
    entries = [{**BOX, "id": number, "bbox": box} for number, box in enumerate(boxes)]
    with pytest.raises(UserError, match=message):
        read_detection(write(content(*entries)))


@pytest.mark.parametrize("box", [[0, 0, 1, 1], [10, 10, 95, 45], [0, 0, 100, 60], [1, 2, 3, 4]])
def test_odd_boxes_of_the_right_format_are(write, box):
    assert read_detection(write(content({**BOX, "bbox": box}))).boxes == 1


@pytest.mark.parametrize("name", ["sub\\a.png", "C:\\data\\sub\\a.png", "/elsewhere/data/sub/a.png"])
def test_file_names_of_other_machines(write, tmp_path, name):
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (100, 60)).save(tmp_path / "sub" / "a.png")
    data = read_detection(write(content(BOX, images=[{"id": 1, "file_name": name}])))
    assert data.samples[0].path == tmp_path / "sub" / "a.png"


def test_other_files_are_refused(tmp_path):
    for value in ([], {"images": []}, {"images": [], "categories": [], "annotations": 3}):
        with pytest.raises(UserError, match="not a COCO file"):
            parse_coco(value, "x.json")
    (tmp_path / "x.json").write_text('{"images": [3], "categories": [{"id": 1, "name": "cat"}]}')
    assert read_coco(tmp_path / "x.json").faults[0].message == "found '3', expected an object"
