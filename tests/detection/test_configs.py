"""The configurations that ship with the package are read by the command, and build what they say."""

from importlib.resources import files
from pathlib import Path

import pytest
import timm
import torch
import yaml

from unimoe.detection import DynamicDinoConfig, DynamicDinoForObjectDetection
from unimoe.detection.cli import main

FOLDER = Path(str(files("unimoe.configs").joinpath("dynamic_dino")))
RUNS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
OVERLAYS = {"moe": "base", "dense": "base", "full_moe": "full"}
"""File -> the one that it changes."""


@pytest.mark.parametrize("name", RUNS)
def test_run(name, capsys):
    with pytest.raises(SystemExit) as done:
        files = [OVERLAYS[name], name] if name in OVERLAYS else [name]
        main(
            [
                "fit",
                *(word for one in files for word in ("-c", str(FOLDER / f"{one}.yaml"))),
                "--print_config",
            ]
        )
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["stage"].replace("-", "_") == name and printed["output"].endswith(printed["stage"])


@pytest.mark.parametrize(("name", "millions"), [("edge", (20, 30)), ("full", (25, 45))])
def test_sizes(name, millions):
    """Weights behind backbone and text encoder, at the size that the file says."""
    settings = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["model"]["detector"]
    backbone, _, _ = (settings.pop(key) for key in ("backbone", "weights", "text_encoder"))
    with torch.device("meta"):
        strides = timm.create_model(backbone, features_only=True).feature_info.reduction()  # type: ignore[union-attr]
        levels = [strides.index(stride) for stride in (8, 16, 32)]
        image = {"model_type": "timm_backbone", "backbone": backbone, "out_indices": levels}
        model = DynamicDinoForObjectDetection(DynamicDinoConfig(backbone_config=image, **settings))
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("backbone", "text_enc")))
    assert millions[0] < count / 1e6 < millions[1]


def test_the_control_differs_from_moe_tuning_in_its_experts_only():
    moe, dense = (yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("moe", "dense"))
    assert moe["data"] == dense["data"]
    assert {**moe["model"], "moe": 0, "trainable": 0} == {**dense["model"], "moe": 0, "trainable": 0}
