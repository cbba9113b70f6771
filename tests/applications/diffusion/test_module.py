"""The whole path on random latents: training, the test's report, samples; a start from another run."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import load_file

from unimoe.applications.diffusion import module as subject
from unimoe.applications.diffusion.data import DiffusionData
from unimoe.applications.diffusion.dit import DiTConfig
from unimoe.applications.diffusion.module import DiffusionModule
from unimoe.applications.labelled_images import LabelledImages
from unimoe.commands import main as cli
from unimoe.errors import UserError


@pytest.mark.parametrize("design", ["promoe", "switch_dit", "dense"])
def test_a_run_is_scored_and_draws(latents, command, scores, design, tmp_path, capsys):
    latents["model"]["dit"]["design"] = design
    latents["model"]["process"] = "ddpm" if design == "dense" else "flow"
    assert cli.main(command(latents)) == 0
    assert cli.main(command(latents, "test")) == 0
    found = scores(latents)
    assert 0 < found["loss"] < 5 and found["images"] > 0
    if design != "dense":
        layers = {"promoe": 1, "switch_dit": 2}[design]
        assert len(found["live_experts"]) == len(found["class_expert_information"]) == layers
        assert -1 <= found["overlap_by_time_distance"] <= 1
    sheet = tmp_path / "sheet.png"
    args = ["sample", latents["output"], "--count", "2", "--steps", "2", "--output", str(sheet)]
    if design == "promoe":
        assert cli.main(args) == 0 and sheet.is_file()
        assert cli.main([*args, "--class", "2"]) == 2
        assert "--class 2: the model knows 0, 1" in capsys.readouterr().err
    if design == "dense":
        assert cli.main([*args, "--steps", "2000"]) == 2
        assert "--steps is 2000, expected at most 1000" in capsys.readouterr().err
        assert not sheet.exists()


def test_mistakes_are_errors(latents, command, capsys):
    assert cli.main([*command(latents), "--model.ema", "1.5"]) == 2
    assert "expected 0 to below 1" in capsys.readouterr().err
    assert cli.main([*command(latents), "--model.samples", "-1"]) == 2
    assert "model.samples is -1, expected at least 0" in capsys.readouterr().err
    assert cli.main([*command(latents), "--model.dit.patch", "3"]) == 2
    assert "model.dit.patch is 3, expected a divisor of the images' side, 4" in capsys.readouterr().err
    assert cli.main([*command(latents), "--data.train", "nowhere"]) == 2
    assert "nowhere has no folder features/" in capsys.readouterr().err
    assert cli.main(["sample", "nowhere"]) == 2
    assert "holds no finished run of an application" in capsys.readouterr().err


def test_a_run_starts_from_another(latents, command, tmp_path, capsys):
    latents["model"]["process"], latents["data"]["steps"] = "ddpm", 1
    assert cli.main(command(latents)) == 0
    start = {**latents["model"], "init_from": latents["output"], "lr": 0.0}
    child = {**latents, "output": str(tmp_path / "child"), "model": start}
    assert cli.main([*command(child), "--model.process", "flow"]) == 2
    assert "has model.process ddpm, but the settings say flow" in capsys.readouterr().err
    assert cli.main([*command(child), "--model.dit.width", "32"]) == 2
    assert "has model.dit.width 16, but the settings say 32" in capsys.readouterr().err
    assert cli.main(command(child)) == 0
    parent, own = (load_file(Path(one["output"]) / "model.safetensors") for one in (latents, child))
    assert all(torch.allclose(own[name], parent[name]) for name in parent)


def test_a_probe_recognises_what_is_drawn(monkeypatch, tmp_path):
    """Images are black or white by class; the network draws black ones whatever the class."""
    labels = np.arange(8) % 2
    shade = np.where(labels, 1.0, -1.0).astype(np.float32)[:, None, None, None]
    images = LabelledImages(np.broadcast_to(shade, (8, 3, 4, 4)).copy(), labels)
    data = DiffusionData()
    data.classes, data.shape, data.sets = ["black", "white"], (3, 4), {"train": images, "test": images}
    module = DiffusionModule(dit=DiTConfig(patch=2, width=16, depth=2, heads=2), samples=3)
    module._trainer = SimpleNamespace(
        datamodule=data,
        state=SimpleNamespace(fn=TrainerFn.TESTING),
        is_global_zero=True,
        default_root_dir=tmp_path,
    )
    module.configure_model()
    drawn = []

    def draw(model, process, label_B, guidance, seed):
        assert model is module.model and process is module.process
        drawn.append(label_B.tolist())
        return torch.full((len(label_B), 3, 4, 4), -1.0)

    monkeypatch.setattr(subject, "draw", draw)
    monkeypatch.setattr(subject, "pretrained_features", lambda: lambda images: images.flatten(1))
    assert module._recognised() == {
        "probe_accuracy": 0.5,
        "probe_accuracy_of_real_images": 1.0,
        "chance": 0.5,
    }
    assert drawn == [[0, 0, 0, 1, 1, 1]] and (tmp_path / "logs/test/samples.png").is_file()
    data.text = 5
    with pytest.raises(UserError, match="needs sprites with classes"):
        module._recognised()
