"""Models and run folders written by unimoe 0.1 (fixtures/written_by_0_1/README.md) are read by today's code.

Tolerances cover other machines' matrix products; on the machine that wrote the files the values are equal.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from unimoe.commands.main import main
from unimoe.data import Collator, read_samples
from unimoe.detection.inference.predictor import Detector
from unimoe.model.build import build_model
from unimoe.model.loading import load_model
from unimoe.training.curve import read_curve

WRITTEN = Path(__file__).parent / "fixtures" / "written_by_0_1"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the folders, as working directory: the runs name their files relative to it."""
    folder = tmp_path / "old"
    shutil.copytree(WRITTEN, folder)
    monkeypatch.chdir(folder)
    return folder


def assert_same_curve(found: Path, expected: Path, tolerance: float) -> None:
    curves = [read_curve(path) for path in (found, expected)]
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    for row, wanted in zip(*curves, strict=True):
        for column in wanted:
            if column.endswith("_per_second"):
                continue  # differs from run to run
            assert row[column] == pytest.approx(wanted[column], rel=tolerance), (column, row["step"])


def test_a_multimodal_moe_model_gives_the_same_logits():
    model, processor = load_model(WRITTEN / "finished_stage", device="cpu")
    batch = Collator(processor)(list(read_samples(WRITTEN / "data" / "train.jsonl")))
    with torch.no_grad():
        logits_BTV = model(**batch).logits[:, -4:]
    expected_BTV = load_file(WRITTEN / "expected" / "logits.safetensors")["logits"]
    assert_close(logits_BTV, expected_BTV, rtol=0, atol=1e-4)  # decoded and resampled media, float32


def test_a_finished_stage_is_known_as_finished(old, caplog):
    before = (old / "finished_stage" / "stage.json").read_bytes()
    assert main(["fit", "-c", "stage.yaml", "--output", "finished_stage"]) == 0
    assert "is finished" in caplog.text
    assert (old / "finished_stage" / "stage.json").read_bytes() == before


def test_a_stage_resumes_to_the_same_curve(old, caplog):
    assert main(["fit", "-c", "stage.yaml"]) == 0
    assert "after step 3 of 6" in caplog.text
    assert_same_curve(old / "stage" / "logs" / "metrics.csv", old / "expected" / "stage.csv", 1e-4)


def test_a_detector_finds_the_same_boxes():
    detector = Detector.load(WRITTEN / "detector", ["cat", "red car"], device="cpu")
    (found,) = detector([Image.open(WRITTEN / "data" / "blocks.png")], threshold=0.0)
    expected = load_file(WRITTEN / "expected" / "detections.safetensors")
    assert torch.equal(found.labels_K, expected["labels"])
    assert_close(found.scores_K, expected["scores"], rtol=1e-4, atol=0)
    assert_close(found.boxes_K4, expected["boxes"], rtol=0, atol=1e-3)  # pixels


def test_a_continual_run_resumes_to_the_same_curves(old):
    assert (
        main(["continual", "run", "-c", "continual.yaml", "--strategy", "dymoe", "--output", "continual"])
        == 0
    )
    for task in ("02-twice", "03-last"):
        path = old / "continual" / task / "metrics.csv"
        assert_same_curve(path, old / "expected" / f"continual.{task}.csv", 1e-4)
    found, expected = (
        json.loads(Path(path).read_text()) for path in ("continual/result.json", "expected/continual.json")
    )
    assert found["matrix"] == expected["matrix"]
    assert found["parameters"] == expected["parameters"]


def test_a_bank_gives_the_same_logits_in_peft():
    expected = load_file(WRITTEN / "expected" / "bank.safetensors")
    ids = torch.arange(20).reshape(2, 10)
    plain, _ = build_model(str(WRITTEN / "llm"), {}, None, "chatml")
    averaged = PeftModel.from_pretrained(plain, str(WRITTEN / "bank"))
    with torch.no_grad():
        assert_close(averaged(input_ids=ids).logits[:, -1], expected["peft"], rtol=0, atol=1e-4)
