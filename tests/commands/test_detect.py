"""``unimoe detect``: any image, labels of the given list, clear errors; one bad file does not end a run."""

import json
import logging

import pytest
from PIL import Image

from unimoe.commands import main as cli
from unimoe.detection.inference.sources import find_inputs, split_prompt


def test_detect_answers_in_json_with_labels_of_the_list(folder, pictures, tmp_path, capsys):
    args = ["detect", str(folder), str(pictures), "--prompt", "cat, Red Car", "--threshold", "0", "--json"]
    assert cli.main([*args, "--draw", str(tmp_path / "drawn")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["names"] == ["cat", "Red Car"]
    sizes = {one["image"].rsplit("/", 1)[1]: (one["width"], one["height"]) for one in answer["images"]}
    assert sizes == {
        "grey.png": (50, 40),
        "clear.png": (40, 50),
        "turned.jpg": (30, 60),
        "plain.jpg": (300, 200),
    }
    for image in answer["images"]:
        assert image["detections"]
        for row in image["detections"]:
            assert row["label"] == answer["names"][row["label_id"]]
            x1, y1, x2, y2 = row["box"]
            assert 0 <= x1 <= x2 <= image["width"] and 0 <= y1 <= y2 <= image["height"]
        scores = [row["score"] for row in image["detections"]]
        assert scores == sorted(scores, reverse=True)
    assert len(list((tmp_path / "drawn").iterdir())) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", " , "], "expected names to look for"),
        (["--prompt", "cat", "--threshold", "2"], "--threshold is 2.0, expected a number from 0 to 1"),
        (["--prompt", "cat", "--top", "0"], "--top is 0, expected at least 1"),
        (["--promt", "cat"], "--promt"),
        (["--prompt", "cat " * 300], "name 0 has 301 tokens, expected at most 254"),
        ([], "--prompt"),
    ],
)
def test_bad_arguments(folder, pictures, capsys, args, message):
    assert cli.main(["detect", str(folder), str(pictures), *args]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_files(folder, pictures, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    film = tmp_path / "film.mp4"
    film.write_bytes(b"no film")
    for place, message in (
        (tmp_path / "none.jpg", "no image is there"),
        (broken, "cannot decode the image"),
        (film, "cannot decode the video"),
    ):
        assert cli.main(["detect", str(folder), str(place), "--prompt", "cat"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["detect", str(tmp_path / "no-model"), str(pictures), "--prompt", "cat"]) == 2
    assert "does not exist; expected a model folder" in capsys.readouterr().err
    assert cli.main(["detect", str(pictures), str(pictures), "--prompt", "cat"]) == 2
    assert "has no config.json; expected a model folder" in capsys.readouterr().err


def test_one_bad_image_does_not_end_the_run(folder, pictures, capsys):
    (pictures / "broken.jpg").write_bytes(b"no image")
    args = ["detect", str(folder), str(pictures), "--prompt", "cat", "--threshold", "0"]
    assert cli.main([*args, "--json"]) == 1
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert len(answer["images"]) == 4 and len(answer["errors"]) == 1
    assert answer["errors"][0]["image"].endswith("broken.jpg")
    assert "cannot decode the image" in answer["errors"][0]["error"]


def test_every_image_has_a_drawing_of_its_own(folder, tmp_path, monkeypatch, capsys):
    place = tmp_path / "in"
    (place / "a").mkdir(parents=True)
    names = ["x.png", ".x.png", "a_b.png", "a/b.png", "../x.png"]
    for name in names:
        Image.new("RGB", (30, 20)).save(place / name)
    monkeypatch.chdir(place)
    assert (
        cli.main(["detect", str(folder), *names, "--prompt", "cat", "--draw", str(tmp_path / "drawn")]) == 0
    )
    drawn = [file.name for file in (tmp_path / "drawn").iterdir()]
    assert len(drawn) == 5 and not any(name.startswith(".") for name in drawn)


def test_one_label_for_a_box_and_one_box_for_a_place(folder, pictures, capsys):
    args = ["detect", str(folder), str(pictures / "grey.png"), "--prompt", "cat, dog, tree", "--json"]

    def found(*more):
        assert cli.main([*args, "--threshold", "0", *more]) == 0
        return json.loads(capsys.readouterr().out)["images"][0]["detections"]

    every, single, few = found(), found("--one-label"), found("--one-label", "--nms", "0.01")
    assert len(every) == 36 and len(single) == 12 and 1 <= len(few) < 12
    best = {tuple(row["box"]): row["label"] for row in reversed(every)}
    assert all(best[tuple(row["box"])] == row["label"] for row in single)


def test_names_and_thresholds_from_a_file(folder, pictures, tmp_path, capsys):
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"a cat, red": 1.0, "dog": None}))
    image = str(pictures / "grey.png")
    args = ["detect", str(folder), image, "--names", str(names), "--threshold", "0", "--json"]
    assert cli.main(args) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["names"] == ["a cat, red", "dog"]
    assert {row["label"] for row in answer["images"][0]["detections"]} == {"dog"}
    assert cli.main([*args, "--class-threshold", "dog=1", "a cat, red=0"]) == 0
    rows = json.loads(capsys.readouterr().out)["images"][0]["detections"]
    assert {row["label"] for row in rows} == {"a cat, red"}
    assert cli.main([*args, "--class-threshold", "lamp=0.5"]) == 2
    assert "'lamp' is not asked for" in capsys.readouterr().err
    assert cli.main([*args, "--prompt", "cat"]) == 2
    assert "one of the two" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["\U0001f34e, \u732b", "cat, \u732b"])
def test_names_that_the_model_cannot_read_are_refused(folder, pictures, capsys, prompt):
    assert cli.main(["detect", str(folder), str(pictures), "--prompt", prompt]) == 2
    assert "is unknown to the model's vocabulary" in capsys.readouterr().err


def test_files_folders_and_patterns(pictures, caplog):
    found = find_inputs([str(pictures / "grey.png"), str(pictures / "*.jpg"), str(pictures)])
    assert [file.name for file in found] == ["grey.png", "turned.jpg", "clear.png", "plain.jpg"]
    with caplog.at_level(logging.WARNING):
        assert split_prompt("cat, red car,, cat ") == ["cat", "red car"]
    assert "2 empty or repeated names are left out" in caplog.text
