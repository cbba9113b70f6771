"""``unimoe export onnx``: the file answers as the model, and no file of the user is overwritten."""

import importlib.util
import json

import pytest

from unimoe.commands import main as cli
from unimoe.detection.inference.predictor import Detector
from unimoe.errors import UserError

WITH_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


@pytest.fixture
def settings(settings):
    """One layer of the decoder: each takes seconds to export, and tests/detection exports several."""
    settings["model"]["detector"]["decoder_layers"] = 1
    return settings


@pytest.mark.skipif(WITH_ONNX, reason="onnx is installed")
def test_without_onnx_the_package_is_named(folder, tmp_path, capsys):
    assert cli.main(["export", "onnx", str(folder), str(tmp_path / "m.onnx"), "--prompt", "cat"]) == 2
    assert "pip install 'unimoe[export]'" in capsys.readouterr().err


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["street.json", "street.onnx"])
@pytest.mark.skipif(not WITH_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
def test_a_file_of_the_user_is_not_overwritten(folder, tmp_path, capsys, name):
    (tmp_path / name).write_text('{"images": []}')
    assert cli.main(["export", "onnx", str(folder), str(tmp_path / "street.onnx"), "--prompt", "cat"]) == 2
    assert f"{name} is there already and not from an export" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == '{"images": []}' and len(list(tmp_path.glob("street.*"))) == 1
