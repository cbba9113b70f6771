"""The detection demo: its sums by hand, and the shipped configurations end to end in miniature."""

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

from unimoe.commands import main as cli
from unimoe.demo import detection as subject
from unimoe.demo import steps
from unimoe.synthetic.detection_scenes import SceneConfig, build_scenes


@pytest.fixture
def miniature(tiny_parts, tmp_path, monkeypatch):
    """Tiny parts, two steps a run, sprites that are squares, photos that are grey."""
    shipped = Path(str(steps.files("unimoe.configs").joinpath("dynamic_dino")))
    (tmp_path / "configs" / "dynamic_dino").mkdir(parents=True)
    small = {"image_size": 64, "d_model": 32, "ffn_dim": 32, "num_heads": 4, "num_queries": 10}
    for path in [shipped / f"{name}.yaml" for name in ("base", "moe", "dense")]:
        content = yaml.safe_load(path.read_text())
        content["data"] |= {"steps": 2, "batch_size": 2}
        if path.stem == "base":
            content["data"]["augment"] |= {"sizes": [64], "longest": 64}
            parts = {"backbone": "test_efficientnet", "text_encoder": str(tiny_parts / "text"), **small}
            content["model"]["detector"] |= parts
        (tmp_path / "configs" / "dynamic_dino" / path.name).write_text(yaml.safe_dump(content))

    def build(folder, config):
        parts = (tiny_parts / name for name in ("sprites", "photos", "sprites"))
        tiny = SceneConfig(images=4, test_images=3, size=64, concepts=5, seed=config.seed)
        return build_scenes(folder, tiny, *parts)

    monkeypatch.setattr(steps, "files", lambda package: tmp_path / "configs")
    monkeypatch.setattr(steps, "fault", lambda part, cache: None)
    monkeypatch.setattr(subject, "build_scenes", build)
    sizes = {"queries": 10, "cells": (8, 4, 2), "rounds": 2}
    monkeypatch.setattr(subject, "decoder_latency", partial(subject.decoder_latency, **sizes))
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_demo_in_miniature(miniature, capsys, monkeypatch):
    output = miniature / "demo"
    args = ["demo", "detection", "--output", str(output), "--seeds", "2"]
    assert cli.main(args) == 0
    report = json.loads((output / "report.json").read_text())
    for kind in ("base", "moe", "dense"):
        for key in ("seen", "unseen", "unseen_artist"):
            assert 0 <= report["ap"][kind][key]["mean"] <= 1
    assert report["ap"]["moe"]["seen"]["seeds"] == 2 and report["latency"]["ratio"] > 0
    assert set(report["experts"]) == {"moe-0", "moe-1"}
    assert (output / "report.html").read_text().count("data:image/jpeg") == 3 * 3 * 4
    said = capsys.readouterr().out
    assert "than the dense control" in said and "unimoe detect" in said

    before = {path: path.stat().st_mtime for path in output.rglob("stage.json")}
    monkeypatch.setattr(subject, "build_scenes", None)
    assert cli.main(args) == 0
    assert before == {path: path.stat().st_mtime for path in output.rglob("stage.json")}
    assert cli.main([*args, "--seed", "5"]) == 2
    assert "was started with seed 0, found 5" in capsys.readouterr().err
