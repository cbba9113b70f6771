"""The whole path of an application: a YAML file, training, its folder, its scores."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from unimoe.commands import main as cli


def test_a_run_learns_and_is_scored(feedback, command, scores, caplog, capsys):
    feedback["data"]["steps"] = 40
    assert cli.main(command(feedback)) == 0
    folder = Path(feedback["output"])
    assert {"config.json", "model.safetensors", "stage.json"} <= {path.name for path in folder.iterdir()}
    assert cli.main(command(feedback, "test")) == 0
    found = scores(feedback)
    assert found["rows"] == 30 and found["mean_auc"] > 0.9
    assert found["auc"]["like"]["value"] > 0.9 and 0 <= found["auc"]["like"]["half_width"] < 0.2
    assert found["parameters"]["network"] == pytest.approx(4000, rel=0.1)
    assert "test/auc_dislike" in caplog.text
    moved = [name for name in load_file(folder / "model.safetensors") if name.endswith("running_mean")]
    assert moved, "statistics of batch normalisation are saved"

    feedback["data"]["features"] = {"user": "id"}
    assert cli.main(command(feedback, "test")) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_mistakes_are_errors(feedback, command, capsys):
    feedback["data"]["tasks"] = {"good": {"like": "like > 1"}}
    assert cli.main(command(feedback)) == 2
    assert "0 of 160 rows of the train split are positive" in capsys.readouterr().err
    assert cli.main([*command(feedback), "--model.network.kind", "mmoee"]) == 2
    assert cli.main([*command(feedback), "--model.network.experts", "0"]) == 2
    assert "model.network.experts is 0, expected at least 1" in capsys.readouterr().err
    assert cli.main([*command(feedback), "--data.train", "nowhere.csv"]) == 2
    assert "there is no data file" in capsys.readouterr().err
    assert not Path(feedback["output"]).exists()
