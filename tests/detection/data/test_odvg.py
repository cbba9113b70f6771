"""Phrases of captions: given by characters, searched, several, or not there."""

import json

from PIL import Image

from unimoe.detection.data.formats import read_detection
from unimoe.detection.data.odvg import read_odvg

CAPTION = "A red car near a tree"


def write(tmp_path, *regions, **changes):
    Image.new("RGB", (100, 60)).save(tmp_path / "a.png")
    lines = [
        {
            "filename": "a.png",
            "height": 60,
            "width": 100,
            "grounding": {"caption": CAPTION, "regions": [region]},
        }
        | changes
        for region in regions
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "set.jsonl"


def test_a_phrase_may_be_a_list(tmp_path):
    path = write(
        tmp_path,
        {"bbox": [10, 10, 40, 40], "phrase": ["A red car", "a tree"]},
        {"bbox": [10, 10, 40, 40], "phrase": "A red car"},
    )
    first, second = read_detection(path).samples
    assert first.spans == (((0, 9), (15, 21)),) and second.spans == (((0, 9),),)


def test_a_phrase_that_is_not_there_loses_its_region_only(tmp_path, caplog):
    path = write(
        tmp_path,
        {"bbox": [10, 10, 40, 40], "phrase": "the red cars"},
        {"bbox": [10, 10, 40, 40], "phrase": "A red car"},
        {"bbox": [10, 10, 40, 40], "phrase": "x", "tokens_positive": [[15, 99]]},
    )
    data = read_detection(path)
    assert [len(sample.boxes_M4) for sample in data.samples] == [0, 1, 0]
    messages = [fault.message for fault in data.faults]
    assert messages[0] == f"the phrase 'the red cars' is not in the caption {CAPTION!r}"
    assert "2 times a phrase is not in its caption; repaired" in caplog.text


def test_sizes_instead_of_corners_are_a_fault(tmp_path):
    path = write(tmp_path, {"bbox": [50, 20, 10, 10], "phrase": "a tree"})
    assert [fault.kind for fault in read_odvg(path).faults] == ["empty box", "box format"]
