"""The whole path on squares on other backgrounds: training, the test's report and picture."""

from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from unimoe.commands import main as cli


def test_a_run_learns_adapts_and_draws(styles, command, scores):
    styles["data"]["steps"], styles["model"]["lr"] = 60, 0.01
    assert cli.main(command(styles)) == 0
    assert cli.main(command(styles, "test")) == 0
    found = scores(styles)
    assert found["images"] == 12 and found["accuracy"] > 0.8
    assert found["gain"] == pytest.approx(found["accuracy"] - found["accuracy_before"])
    assert found["accuracy_by_domain"] == {"e": found["accuracy"]} and 0 <= found["worst_domain"] <= 1
    assert 0 <= found["accuracy_of_knowledge"] <= 1
    page = Image.open(Path(styles["output"]) / "logs/test/changes.png")
    assert page.size == (12 * 20, 3 * 20)


def test_experts_stay_after_pretraining_and_a_dense_model_has_none(styles, command, scores):
    weights = {}
    for name, pretrain in (("meta", 0.5), ("plain", 0.5), ("dense", 0.5)):
        settings = {**styles, "output": f"{styles['output']}_{name}"}
        settings["model"] = {**styles["model"], "pretrain": pretrain}
        settings["model"]["network"] = {**styles["model"]["network"], "design": name}
        assert cli.main(command(settings)) == 0
        weights[name] = load_file(Path(settings["output"]) / "model.safetensors")
    assert cli.main(command(settings, "test")) == 0
    found = scores(settings)
    assert found["gain"] == 0 and "accuracy_of_knowledge" not in found
    assert found["parameters"]["total"] == found["parameters"]["student"]
    assert not [name for name in weights["dense"] if name.startswith(("experts", "aggregator"))]
    for name, weight in weights["meta"].items():
        same = weight.equal(weights["plain"][name])
        assert same is name.startswith("expert"), f"{name}: only the last stage differs"


def test_mistakes_are_errors(styles, command, capsys):
    for flags, message in (
        (["--data.train", "nowhere"], "there is no data file nowhere/metadata.csv"),
        (["--model.network.experts", "4"], "model.network.experts is 4, expected at most 3"),
        (["--model.inner_lr", "-1"], "model.inner_lr is -1.0, expected at least 0"),
        (["--model.pretrain", "2"], "model.pretrain is 2.0, expected 0 to 1"),
    ):
        assert cli.main([*command(styles), *flags]) == 2
        assert message in capsys.readouterr().err
