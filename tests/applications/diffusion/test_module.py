"""The whole path on random latents: training, resuming, two ranks, the test's report, samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from unimoe.commands import main as cli
from unimoe.testing import assert_same_run, run_together

FIT = """
import sys
from unimoe.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def settings(tmp_path) -> dict:
    random = np.random.default_rng(0)
    for name in ("features", "labels"):
        (tmp_path / name).mkdir()
    for place in range(60):
        image = random.normal(size=(1, 3, 4, 4)).astype(np.float32) * 0.1 + place % 2
        np.save(tmp_path / f"features/{place}.npy", image)
        np.save(tmp_path / f"labels/{place}.npy", np.array([place % 2]))
    dit = {"design": "promoe", "experts": 3, "patch": 2, "width": 16, "depth": 2, "heads": 2}
    return {
        "system": "diffusion",
        "output": str(tmp_path / "run"),
        "model": {"dit": dit, "lr": 0.001, "ema": 0.9},
        "data": {"train": str(tmp_path), "steps": 4, "batch_size": 16},
        "trainer": {"accelerator": "cpu"},
    }


def command(settings: dict, verb: str = "fit") -> list[str]:
    path = Path(settings["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return [verb, "-c", str(path)]


def scores(settings: dict) -> dict:
    return json.loads((Path(settings["output"]) / "logs/test/scores.json").read_text())


@pytest.mark.parametrize("design", ["promoe", "switch_dit", "dense"])
def test_a_run_is_scored_and_draws(settings, design, tmp_path, capsys):
    settings["model"]["dit"] |= {"design": design, "k": 2 if design == "switch_dit" else 1}
    settings["model"]["process"] = "ddpm" if design == "dense" else "flow"
    assert cli.main(command(settings)) == 0
    assert cli.main(command(settings, "test")) == 0
    found = scores(settings)
    assert 0 < found["loss"] < 5 and found["images"] > 0
    if design != "dense":
        layers = {"promoe": 1, "switch_dit": 2}[design]
        assert len(found["live_experts"]) == len(found["class_expert_information"]) == layers
        assert -1 <= found["overlap_by_time_distance"] <= 1
    if design == "promoe":
        sheet = tmp_path / "sheet.png"
        args = ["sample", settings["output"], "--count", "2", "--steps", "2", "--output", str(sheet)]
        assert cli.main(args) == 0 and sheet.is_file()
        assert cli.main([*args, "--class", "2"]) == 2
        assert "--class 2: the model knows 0, 1" in capsys.readouterr().err


def test_mistakes_are_errors(settings, capsys):
    assert cli.main([*command(settings), "--model.ema", "1.5"]) == 2
    assert "expected 0 to below 1" in capsys.readouterr().err
    assert cli.main([*command(settings), "--data.train", "nowhere"]) == 2
    assert "nowhere has no folder features/" in capsys.readouterr().err
    assert cli.main(["sample", "nowhere"]) == 2
    assert "holds no finished run of an application" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_9_changes_nothing(settings, tmp_path):
    settings |= {"data": {**settings["data"], "steps": 12}, "checkpoint_every": 3}
    whole = {**settings, "output": str(tmp_path / "whole")}
    assert cli.main(command(whole)) == 0
    die = {"class_path": "unimoe.testing.DieAt", "init_args": {"step": 8, "rank": 0}}
    with pytest.raises(RuntimeError, match="exit codes: -9$"):
        run_together(1, FIT, *command({**settings, "trainer": {"accelerator": "cpu", "callbacks": [die]}}))
    assert cli.main(command(settings)) == 0
    assert_same_run(Path(settings["output"]), tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_are_one(settings, tmp_path):
    two = {**settings, "output": str(tmp_path / "two"), "data": {**settings["data"], "batch_size": 8}}
    two["trainer"] = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    assert cli.main(command(settings)) == 0
    run_together(2, FIT, *command(two))
    assert_same_run(tmp_path / "two", Path(settings["output"]))
    run_together(2, FIT, *command(two, "test"))
    assert cli.main(command(settings, "test")) == 0
    assert scores(settings)["loss"] == pytest.approx(scores(two)["loss"], abs=1e-5)
