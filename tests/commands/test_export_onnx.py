"""``unimoe export onnx``: the file answers as the model, and no file of the user is overwritten."""

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimoe.commands import main as cli
from unimoe.detection.inference import onnx
from unimoe.detection.inference.onnx import OnnxDetector, export_onnx
from unimoe.detection.inference.predictor import Detector
from unimoe.detection.model.build import build_detector
from unimoe.detection.model.moe_tuning import GATES
from unimoe.errors import UserError

WITH_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
NAMES = ["cat", "red car", "tree"]


@pytest.mark.skipif(WITH_ONNX, reason="onnx is installed")
def test_without_onnx_the_package_is_named(folder, tmp_path, capsys):
    assert cli.main(["export", "onnx", str(folder), str(tmp_path / "m.onnx"), "--prompt", "cat"]) == 2
    assert "pip install 'unimoe[export]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(sizes, tmp_path_factory) -> Path:
    """A folder with twenty pictures, a detector in ``model`` and what the command made of it: an export takes
    half a minute. One layer of its decoder is dense, the other has experts."""
    place = tmp_path_factory.mktemp("exported")
    noise = np.random.default_rng(0)
    for number in range(20):
        width, height = noise.integers(40, 200, 2).tolist()
        small = noise.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(place / f"{number:02d}.png")
    combine, router = GATES["straight_through"]
    moe = {
        "router": {"kind": "top_k", "k": 2, **router},
        "experts": {"kind": "ffn", "copies": 2, "slices": 2},
        "combine": combine,
        "placement": [1],
    }
    torch.manual_seed(0)
    model, tokenizer = build_detector(**sizes, moe=moe)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for part in (model, tokenizer):
        part.save_pretrained(place / "model")
    args = [str(place / "model"), str(place / "m.onnx"), "--prompt", ", ".join(NAMES)]
    assert cli.main(["export", "onnx", *args, "--images", str(place / "*.png")]) == 0
    return place


@pytest.mark.slow
@pytest.mark.skipif(not WITH_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
def test_boxes_and_scores_on_twenty_pictures(exported):
    """Each answer of the model has one of the file's with its label, score and box (on a 0..1 scale)."""
    file = exported / "m.onnx"
    assert json.loads(file.with_suffix(".json").read_text())["names"] == NAMES
    pictures = [Image.open(path) for path in sorted(exported.glob("*.png"))]
    wanted, found = (
        kind.load(path, NAMES)(pictures, threshold=0.0)
        for kind, path in ((Detector, exported / "model"), (OnnxDetector, file))
    )
    assert len(pictures) == 20
    for picture, one, other in zip(pictures, wanted, found, strict=True):
        assert len(one.scores_K) == len(other.scores_K) == 12 * len(NAMES)
        scale = torch.tensor([*picture.size, *picture.size])
        rows, others = (
            torch.cat([d.boxes_K4 / scale, d.scores_K[:, None], d.labels_K[:, None]], 1) for d in (one, other)
        )
        nearest = torch.cdist(rows, others, p=float("inf")).min(dim=1)
        assert nearest.values.max() < 1e-3 and nearest.indices.unique().numel() == len(rows)

    session = importlib.import_module("onnxruntime").InferenceSession(str(file))
    assert [entry.shape[0] for entry in (*session.get_inputs(), *session.get_outputs())] == ["batch"] * 4
    detector = OnnxDetector(file)
    for count in (3, 1):  # the file takes any number of images
        pixels = [detector.resize(picture) for picture in pictures[:count]]
        together = session.run(None, onnx._inputs(pixels, detector.side))
        for row, image in enumerate(pixels):
            alone = session.run(None, onnx._inputs([image], detector.side))
            for one, other in zip(together, alone, strict=True):
                np.testing.assert_allclose(one[row], other[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not WITH_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
def test_the_command_detect_takes_the_file_as_the_model(exported, pictures, capsys):
    file = exported / "m.onnx"
    answers = []
    for model in (exported / "model", file):
        capsys.readouterr()
        prompt = ["--prompt", ", ".join(NAMES), "--threshold", "0"]
        assert cli.main(["detect", str(model), str(pictures), *prompt, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["images"])
    for one, other in zip(*answers, strict=True):
        assert len(one["detections"]) == len(other["detections"]) > 0
        for row, copy in zip(one["detections"], other["detections"], strict=True):
            assert row["score"] == pytest.approx(copy["score"], abs=1e-3)
    assert cli.main(["detect", str(file), str(pictures), "--prompt", "dog"]) == 2
    assert "was exported for other names" in capsys.readouterr().err


@pytest.mark.skipif(not WITH_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
def test_the_name_of_the_file_is_checked_first(folder, tmp_path):
    model = Detector.load(folder, ["cat"]).model
    with pytest.raises(UserError, match=r"expected a file name that ends with \.onnx"):
        export_onnx(model, None, ["cat"], tmp_path / "m.txt")


@pytest.mark.parametrize("name", ["street.json", "street.onnx"])
@pytest.mark.skipif(not WITH_ONNX, reason="onnx, onnxscript and onnxruntime are not installed")
def test_a_file_of_the_user_is_not_overwritten(folder, tmp_path, capsys, name):
    (tmp_path / name).write_text('{"images": []}')
    assert cli.main(["export", "onnx", str(folder), str(tmp_path / "street.onnx"), "--prompt", "cat"]) == 2
    assert f"{name} is there already and not from an export" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == '{"images": []}' and len(list(tmp_path.glob("street.*"))) == 1
