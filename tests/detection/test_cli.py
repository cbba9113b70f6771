"""The whole path: a YAML file, training, a model folder, its average precision; and what goes wrong."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from unimoe.commands import main as cli
from unimoe.detection.model.loading import load_detector
from unimoe.testing import run_together
from unimoe.training.curve import read_curve
from unimoe.training.resume import latest_checkpoint

SPEED = {"train/images_per_second"}
FIT = """
import sys
from unimoe.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def command(settings: dict, verb: str = "fit") -> list[str]:
    path = Path(settings["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return [verb, "-c", str(path)]


def metrics(settings: dict) -> dict:
    return json.loads(Path(settings["output"], "stage.json").read_text())["metrics"]


@pytest.mark.slow
def test_eight_pictures_are_learned_by_heart(settings, capsys, caplog):
    settings |= {"data": {**settings["data"], "steps": 80}, "checkpoint_every": 80}
    assert cli.main(command(settings)) == 0
    assert metrics(settings)["val/AP"] > 0.9
    assert cli.main(command(settings, "validate")) == 0
    assert any("val/AP  " in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_leaves_a_model_and_goes_on_to_experts(settings, world, tmp_path, capsys, cached):
    settings["data"] |= {"steps": 2, "cache_features": cached, "copies": 2 if cached else 1}
    settings["model"]["freeze_encoders"] = True
    assert cli.main(command(settings)) == 0
    folder = Path(settings["output"])
    assert {"config.json", "model.safetensors", "stage.json", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert {"train/loss", "train/denoising", "val/AP"} <= metrics(settings).keys()
    assert (tmp_path / "features").is_dir() == cached

    tuned = {**settings, "output": str(tmp_path / "experts")}
    tuned["model"] = {"init_from": str(folder), "moe": {"copies": 2, "slices": 2}, "lr": 1e-3}
    assert cli.main(command(tuned)) == 0
    model, _ = load_detector(tuned["output"])
    assert model.config.moe["experts"]["copies"] * model.config.moe["experts"]["slices"] == 4
    assert json.loads((tmp_path / "experts" / "stage.json").read_text())["parents"][0]["stage"] == "tiny"
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "experts" / "model.safetensors"),
    )
    capsys.readouterr()
    assert cli.main([*command(tuned, "validate"), "--model.evaluation", "lvis-fixed"]) == 0
    assert "APr" in capsys.readouterr().out
    left = tmp_path / "experts" / "logs" / "validate"
    assert json.loads((left / "scores.json").read_text())["style"] == "lvis-fixed"
    assert len(json.loads((left / "detections.json").read_text())) == 8 * 12 * 4

    changed = {name for name in before.keys() & after.keys() if not before[name].equal(after[name])}
    assert any("decoder.box_heads" in name for name in changed)
    assert not any(name.startswith(("backbone", "text_", "selection")) for name in changed)


def test_maps_of_a_backbone_that_learns_are_not_kept(settings, capsys):
    settings["data"]["cache_features"] = True
    assert cli.main(command(settings)) == 2
    assert "needs a frozen backbone" in capsys.readouterr().err
    assert not Path(settings["output"]).exists()


def test_mistakes_are_errors(settings, capsys, tmp_path):
    settings["model"]["detector"]["num_querys"] = 5
    assert cli.main(command(settings)) == 2
    assert "no setting 'num_querys'; closest: num_queries" in capsys.readouterr().err
    del settings["model"]["detector"]["num_querys"]
    for where, key in (("data", "stepz"), ("model", "learning_rate")):
        wrong = {**settings, where: {**settings[where], key: 1}}
        assert cli.main(command(wrong)) == 2
        assert key in capsys.readouterr().err
    assert cli.main([*command(settings), "--system", "detector"]) == 2
    assert "expected one of stages, detection" in capsys.readouterr().err
    assert cli.main([*command(settings), "--data.train", str(tmp_path / "no.json")]) == 2
    assert "there is no data file" in capsys.readouterr().err
    assert not Path(settings["output"]).exists()


@pytest.mark.slow
def test_kill_9_changes_nothing(settings, tmp_path, caplog):
    settings["data"]["steps"] = 16
    whole = {**settings, "output": str(tmp_path / "whole")}
    assert cli.main(command(whole)) == 0
    die = {"class_path": "unimoe.testing.DieAt", "init_args": {"step": 9, "rank": 0}}
    with pytest.raises(RuntimeError, match="exit codes: -9$"):
        run_together(1, FIT, *command({**settings, "trainer": {"callbacks": [die]}}))
    found = latest_checkpoint(Path(settings["output"], "checkpoints", "last.ckpt"))
    assert found is not None
    begun = found[1]
    assert 0 < begun < 16
    assert cli.main(command(settings)) == 0
    assert f"resuming after step {begun} of 16" in caplog.text
    curves = [read_curve(Path(run["output"], "logs", "metrics.csv")) for run in (whole, settings)]
    assert [row["step"] for row in curves[0]] == [row["step"] for row in curves[1]]
    for one, other in zip(*curves, strict=True):
        for key in one.keys() - SPEED:
            assert other[key] == pytest.approx(one[key], abs=1e-4), (key, one["step"])
