"""What a run refuses before its first step, and evaluation in full precision."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from unimoe.commands import main as cli
from unimoe.detection.data.datamodule import eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.evaluator import DetectionEvaluator
from unimoe.detection.model.loading import load_detector
from unimoe.detection.module import check_precision
from unimoe.errors import UserError


def command(settings: dict, verb: str = "fit") -> list[str]:
    path = Path(settings["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return [verb, "-c", str(path)]


@pytest.mark.parametrize("patterns", [[], ["backbone.*"], ["backbone.*", "text_encoder.*"]])
def test_a_run_in_which_nothing_trains_is_refused(settings, capsys, patterns):
    settings["model"] |= {"freeze_encoders": True, "trainable": patterns}
    assert cli.main(command(settings)) == 2
    error = capsys.readouterr().err
    assert f"nothing trains: model.trainable is {patterns}" in error and error.count("unimoe: error") == 1
    assert not Path(settings["output"]).exists()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "transformer-engine"])
def test_half_precision_weights_are_refused_before_the_first_step(precision):
    if precision.endswith("-true"):
        with pytest.raises(UserError, match=f"trainer.precision {precision} rounds boxes"):
            check_precision(precision)
    for fine in ("32-true", "64-true", "bf16-mixed", "16-mixed"):
        check_precision(fine)


def test_half_precision_leaves_nothing_behind(settings, capsys):
    settings["trainer"] = {"precision": "bf16-true"}
    assert cli.main(command(settings)) == 2
    assert "set bf16-mixed, 16-mixed or 32-true" in capsys.readouterr().err
    assert not Path(settings["output"]).exists()


def test_evaluation_is_in_full_precision_under_mixed_precision(settings, world):
    """The run's own detections are those of a float32 evaluation, not rounded to eight bits."""
    settings["trainer"] = {"precision": "bf16-mixed"}
    settings["model"] |= {"freeze_encoders": True}
    settings["data"]["steps"] = 1
    assert cli.main(command(settings)) == 0
    assert cli.main(command(settings, "validate")) == 0
    left = Path(settings["output"], "logs", "validate", "detections.json")
    found = json.loads(left.read_text())
    model, tokenizer = load_detector(settings["output"])
    data = read_detection(world / "val.json")
    evaluator = DetectionEvaluator(model, tokenizer, data)
    for batch in eval_dataloader(data, model, batch_size=8):
        evaluator.update(batch)
    for key in ("score", "bbox"):
        ours, theirs = (torch.tensor([row[key] for row in rows]) for rows in (found, evaluator.results))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_set_whose_boxes_are_all_empty_is_not_trained_on(settings, world, tmp_path, capsys):
    content = json.loads((world / "train.json").read_text())
    for entry in content["annotations"]:
        entry["bbox"][2] = 0
    for image in content["images"]:
        image["file_name"] = str(world / image["file_name"])
    (tmp_path / "empty.json").write_text(json.dumps(content))
    settings["data"]["train"] = str(tmp_path / "empty.json")
    assert cli.main(command(settings)) == 2
    assert "none of its 12 boxes has an area inside its image" in capsys.readouterr().err
    del content["annotations"]
    (tmp_path / "empty.json").write_text(json.dumps(content))
    assert cli.main(command(settings)) == 2
    assert "has no annotations to train on" in capsys.readouterr().err
