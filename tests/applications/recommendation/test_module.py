"""The whole path of an application: a YAML file, training, its folder, its scores; resuming and two ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from unimoe.commands import main as cli
from unimoe.testing import assert_same_run, run_together

FIT = """
import sys
from unimoe.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def settings(tmp_path) -> dict:
    """Users who like what has their number's parity."""
    random = np.random.default_rng(0)
    pairs = random.integers(9, size=(200, 2)).tolist()
    rows = [f"{user},{item},{(user + item) % 2}" for user, item in pairs]
    (tmp_path / "feedback.csv").write_text("\n".join(["user,item,like", *rows]) + "\n")
    return {
        "system": "recommendation",
        "output": str(tmp_path / "run"),
        "model": {"network": {"kind": "home", "parameters": 4000}, "embedding": 8, "lr": 0.01},
        "data": {
            "train": str(tmp_path / "feedback.csv"),
            "features": {"user": "id", "item": "id"},
            "tasks": {"good": {"like": "like"}, "bad": {"dislike": "like < 1"}},
            "steps": 4,
            "batch_size": 64,
        },
        "trainer": {"accelerator": "cpu"},
    }


def command(settings: dict, verb: str = "fit") -> list[str]:
    path = Path(settings["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return [verb, "-c", str(path)]


def test_a_run_learns_and_is_scored(settings, caplog, capsys):
    settings["data"]["steps"] = 40
    assert cli.main(command(settings)) == 0
    folder = Path(settings["output"])
    assert {"config.json", "model.safetensors", "stage.json"} <= {path.name for path in folder.iterdir()}
    assert cli.main(command(settings, "test")) == 0
    scores = json.loads((folder / "logs/test/scores.json").read_text())
    assert scores["rows"] == 30 and scores["mean_auc"] > 0.9
    assert scores["auc"]["like"]["value"] > 0.9 and 0 <= scores["auc"]["like"]["half_width"] < 0.2
    assert scores["parameters"]["network"] == pytest.approx(4000, rel=0.1)
    assert "test/auc_dislike" in caplog.text
    moved = [name for name in load_file(folder / "model.safetensors") if name.endswith("running_mean")]
    assert moved, "statistics of batch normalisation are saved"

    settings["data"]["features"] = {"user": "id"}
    assert cli.main(command(settings, "test")) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_mistakes_are_errors(settings, capsys):
    settings["data"]["tasks"] = {"good": {"like": "like > 1"}}
    assert cli.main(command(settings)) == 2
    assert "0 of 160 rows of the train split are positive" in capsys.readouterr().err
    assert cli.main([*command(settings), "--model.network.kind", "mmoee"]) == 2
    assert cli.main([*command(settings), "--data.train", "nowhere.csv"]) == 2
    assert "there is no data file" in capsys.readouterr().err
    assert not Path(settings["output"]).exists()


@pytest.mark.slow
def test_kill_9_changes_nothing(settings, tmp_path, caplog):
    settings |= {"data": {**settings["data"], "steps": 12}, "checkpoint_every": 3}
    whole = {**settings, "output": str(tmp_path / "whole")}
    assert cli.main(command(whole)) == 0
    die = {"class_path": "unimoe.testing.DieAt", "init_args": {"step": 8, "rank": 0}}
    with pytest.raises(RuntimeError, match="exit codes: -9$"):
        run_together(1, FIT, *command({**settings, "trainer": {"accelerator": "cpu", "callbacks": [die]}}))
    assert cli.main(command(settings)) == 0
    assert "resuming after step" in caplog.text
    assert_same_run(Path(settings["output"]), tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_are_one(settings, tmp_path):
    settings["model"]["lr"] = 0.001  # sums in another order; Adam makes steps of the smallest gradients
    two = {**settings, "output": str(tmp_path / "two"), "data": {**settings["data"], "batch_size": 32}}
    two["trainer"] = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    assert cli.main(command(settings)) == 0
    run_together(2, FIT, *command(two))
    assert_same_run(tmp_path / "two", Path(settings["output"]))
    run_together(2, FIT, *command(two, "test"))
    assert cli.main(command(settings, "test")) == 0
    scores = [
        json.loads((Path(one["output"]) / "logs/test/scores.json").read_text()) for one in (settings, two)
    ]
    assert scores[0]["mean_auc"] == pytest.approx(scores[1]["mean_auc"], abs=1e-6)
