"""``unimoe compress`` on a tiny detector: the folders load, search and are scored like the original."""

import json

import pytest
import torch
import yaml

from unimoe.commands import main as cli
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.moe_tuning import moe_tuning
from unimoe.moe.experts.packed_ffn import PackedFFNExperts
from unimoe.moe.view import view


@pytest.fixture
def experts(folder):
    """Experts that differ, and routers that tell queries apart."""
    model, tokenizer = load_detector(folder)
    model = moe_tuning(model, copies=2, slices=2)
    for layer in view(model):
        for stack in layer.stacks().values():
            torch.nn.init.normal_(stack, std=0.3)
        torch.nn.init.normal_(layer.router_rows())
    model.save_pretrained(folder)
    return folder


def found_by(model, world, tmp_path, *more):
    file = tmp_path / f"{model.name}.json"
    data = ["--gt", str(world / "train.json"), "--dt", str(file), *more]
    assert cli.main(["evaluate", "detector", str(model), *data]) == 0
    return torch.tensor([row["score"] for row in json.loads(file.read_text())])


def test_a_detector_is_pruned_and_packed_and_scored(experts, world, tmp_path, capsys, monkeypatch):
    stats, pruned, packed = (str(tmp_path / name) for name in ("stats", "pruned", "packed"))
    data = str(world / "train.json")
    monkeypatch.setenv("HOME", str(experts.parent))
    model = f"~/{experts.name}"
    assert cli.main(["compress", "stats", model, data, "--samples", "4", "--output", stats]) == 0
    budget = ["--budget", "0.75", "--globally", "--how", "frequency"]
    assert cli.main(["compress", "prune", str(experts), "--stats", stats, *budget, "--output", pruned]) == 0
    flags = ["--bits", "8", "--group", "16", "--min-tokens", "1", "--samples", "4"]
    assert cli.main(["compress", "quantize", pruned, data, *flags, "--output", packed]) == 0
    plan = yaml.safe_load((tmp_path / "packed" / "plan.yaml").read_text())
    assert sum(map(len, plan["keep"])) == 6 and set(sum(plan["bits"], [])) == {8}
    layers = view(load_detector(packed)[0])
    assert all(type(layer.experts) is PackedFFNExperts for layer in layers)
    before = found_by(tmp_path / "pruned", world, tmp_path)
    after = found_by(tmp_path / "packed", world, tmp_path, "--plots", str(tmp_path / "plots"))
    assert 0 < (before - after).abs().max() < 0.02
    load = json.loads((tmp_path / "plots" / "experts.json").read_text())["load"]
    gone = [[row[one] for one in {*range(4)} - {*keep}] for row, keep in zip(load, plan["keep"], strict=True)]
    assert not any(sum(gone, [])) and len(load[0]) == 4
    assert cli.main(["export", "onnx", packed, str(tmp_path / "a.onnx"), "--prompt", "cat"]) == 2
    assert "the experts are packed" in capsys.readouterr().err


def test_a_detector_is_merged_and_reported_by_its_precision(experts, world, tmp_path, capsys):
    merged, page, data = str(tmp_path / "merged"), tmp_path / "report", str(world / "train.json")
    flags = ["--keep", "3", "--tokens", "40", "--samples", "4", "--output", merged]
    assert cli.main(["compress", "merge", str(experts), data, *flags]) == 0
    plan = yaml.safe_load((tmp_path / "merged" / "plan.yaml").read_text())
    asked = ["--data", data, "--steps", "2", "--samples", "4", "--output", str(page)]
    assert cli.main(["compress", "report", str(experts), merged, *asked]) == 0
    out = capsys.readouterr().out
    assert "ms/image  train: AP  train: AP lost" in out
    first, second = json.loads((page / "report.json").read_text())["models"]
    assert second["experts"] == [1 + max(row) for row in plan["merge"]] and sum(second["experts"]) == 6
    assert first["quality"]["train"]["lost"] == 0 and second["bytes"] < first["bytes"]
    scores = [one["quality"]["train"] for one in (first, second)]
    assert scores[1]["lost"] == scores[0]["ap"] - scores[1]["ap"] and scores[0]["images"] == 4
    assert "The loss of AP is" in (page / "report.html").read_text()


def test_what_a_detector_has_not_is_refused(experts, world, tmp_path, capsys):
    data, output = str(world / "train.json"), ["--output", str(tmp_path / "out")]
    assert cli.main(["compress", "quantize", str(experts), data, "--head", "8", *output]) == 2
    assert "--head is for language models; leave it out" in capsys.readouterr().err
    assert cli.main(["compress", "skip", str(experts), data, *output]) == 2
    assert "is a detector; skip and tune are for language models" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["compress", "stats", str(tmp_path / "empty"), data, *output]) == 2
    assert "no config.json; expected the folder of a multimodal model" in capsys.readouterr().err
    assert cli.main(["compress", "prune", str(tmp_path / "none"), "--keep", "1", *output]) == 2
    assert "none is no folder, expected that of a model" in capsys.readouterr().err
    assert cli.main(["compress", "merge", str(experts), data, "--keep", "3", "--tokens", "0", *output]) == 2
    assert "--tokens is 0, expected at least 1" in capsys.readouterr().err
    empty = str(tmp_path / "empty")
    assert cli.main(["compress", "report", str(experts), empty, "--data", data, *output]) == 2
    assert "empty is no detector, expected one, as MODEL is" in capsys.readouterr().err
    (tmp_path / "bare.json").write_text(
        json.dumps({**json.loads((world / "train.json").read_text()), "annotations": []})
    )
    bare = ["--data", str(tmp_path / "bare.json"), "--media-root", str(world)]
    assert cli.main(["compress", "report", str(experts), str(experts), *bare, *output]) == 2
    assert "has no boxes to score detectors by" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
