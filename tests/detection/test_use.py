"""``unimoe detect`` and ``unimoe export onnx``: any picture, labels of the given list, clear errors."""

import importlib.util
import json
import logging

import pytest
from PIL import Image
from torch.testing import assert_close

from unimoe.commands import main as cli
from unimoe.detection.inference.drawing import draw_boxes
from unimoe.detection.inference.predictor import Detector
from unimoe.detection.inference.sources import find_inputs, split_prompt
from unimoe.errors import UserError

WITH_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


@pytest.fixture
def pictures(tmp_path):
    """Grey, transparent, turned by EXIF, and plain, in a folder."""
    place = tmp_path / "pictures"
    place.mkdir()
    Image.new("L", (50, 40), 90).save(place / "grey.png")
    Image.new("RGBA", (40, 50), (9, 200, 9, 100)).save(place / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 30), "red").save(place / "turned.jpg", exif=exif)
    (place / "in").mkdir()
    Image.new("RGB", (300, 200), "blue").save(place / "in" / "plain.jpg")
    (place / "notes.txt").write_text("no picture")
    return place


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


def test_pictures_do_not_depend_on_one_another(folder):
    detector = Detector.load(folder, ["cat", "tree"])
    pictures = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (90, 30), "blue")]
    together = detector(pictures, threshold=0.0)
    for picture, one in zip(pictures, together, strict=True):
        (alone,) = detector([picture], threshold=0.0)
        assert_close(alone.scores_K, one.scores_K)
        assert_close(alone.boxes_K4, one.boxes_K4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", " , "], "expected names to look for"),
        (["--prompt", "cat", "--threshold", "2"], "--threshold is 2.0, expected a number from 0 to 1"),
        (["--prompt", "cat", "--top", "0"], "--top is 0, expected at least 1"),
        (["--promt", "cat"], "--prompt"),
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
        (tmp_path / "none.jpg", "no picture is there"),
        (broken, "cannot decode the image"),
        (film, "film"),
    ):
        assert cli.main(["detect", str(folder), str(place), "--prompt", "cat"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["detect", str(tmp_path / "no-model"), str(pictures), "--prompt", "cat"]) == 2
    assert "does not exist; expected a model folder" in capsys.readouterr().err
    assert cli.main(["detect", str(pictures), str(pictures), "--prompt", "cat"]) == 2
    assert "has no config.json; expected a model folder" in capsys.readouterr().err


def test_files_folders_and_patterns(pictures, caplog):
    found = find_inputs([str(pictures / "grey.png"), str(pictures / "*.jpg"), str(pictures)])
    assert [file.name for file in found] == ["grey.png", "turned.jpg", "clear.png", "plain.jpg"]
    with caplog.at_level(logging.WARNING):
        assert split_prompt("cat, red car,, cat ") == ["cat", "red car"]
    assert "2 empty or repeated names are left out" in caplog.text


def test_boxes_are_drawn_on_a_copy():
    picture = Image.new("RGB", (60, 60), "white")
    drawn = draw_boxes(picture, [[10, 30, 50, 55], [0, 0, 5, 5]], [0, 1], ["cat 0.90", ""])
    assert picture.getcolors() == [(3600, (255, 255, 255))]
    assert drawn.getpixel((10, 45)) != (255, 255, 255) and drawn.getpixel((30, 45)) == (255, 255, 255)


@pytest.mark.skipif(WITH_ONNX, reason="onnx is installed")
def test_without_onnx_the_package_is_named(folder, tmp_path, capsys):
    assert cli.main(["export", "onnx", str(folder), str(tmp_path / "m.onnx"), "--prompt", "cat"]) == 2
    assert "pip install 'unimoe[export]'" in capsys.readouterr().err


@pytest.mark.skipif(not WITH_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
def test_an_exported_file_answers_as_the_model(folder, pictures, tmp_path, capsys):
    file = tmp_path / "m.onnx"
    prompt = ["--prompt", "cat, red car", "--threshold", "0"]
    assert (
        cli.main(
            ["export", "onnx", str(folder), str(file), "--prompt", "cat, red car", "--images", str(pictures)]
        )
        == 0
    )
    answers = []
    for model in (folder, file):
        capsys.readouterr()
        assert cli.main(["detect", str(model), str(pictures), *prompt, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["images"])
    for one, other in zip(*answers, strict=True):
        assert len(one["detections"]) == len(other["detections"])
        for row, copy in zip(one["detections"], other["detections"], strict=True):
            assert row["score"] == pytest.approx(copy["score"], abs=1e-3)
    assert cli.main(["detect", str(file), str(pictures), "--prompt", "dog"]) == 2
    assert "was exported for other names" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"expected a file name that ends with \.onnx"):
        from unimoe.detection.inference.onnx import export_onnx

        model = Detector.load(folder, ["cat"]).model
        export_onnx(model, None, ["cat"], tmp_path / "m.txt")
