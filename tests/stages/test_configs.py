"""The configurations that ship with the package are read by the commands they are for."""

from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from unimoe.demo.run import OVERLAYS
from unimoe.moe import MoEConfig
from unimoe.stages.assemble import read_manifest
from unimoe.stages.cli import main

FOLDER = Path(str(files("unimoe.configs").joinpath("uni_moe")))
STAGES = ("align", "expert_image", "expert_speech", "moe", "dense")


@pytest.mark.parametrize("stage", STAGES)
def test_stage(stage, capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(FOLDER / f"{stage}.yaml"), "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["stage"] == stage
    assert printed["output"] == f"runs/demo/{stage}"


def test_manifest():
    manifest = read_manifest(FOLDER / "assemble.yaml")
    moe = MoEConfig.from_dict({**manifest.moe, "num_experts": len(manifest.experts)})
    assert moe.num_experts == 4
    sources = {slot.source for slot in manifest.experts} | {manifest.base} | set(manifest.connectors.values())
    assert sources - {"base"} <= {f"runs/demo/{stage}" for stage in STAGES}


@pytest.mark.parametrize("stage", ["align_more", *OVERLAYS])
def test_stage_of_the_extended_demo(stage, capsys):
    under = ["-c", str(FOLDER / f"{OVERLAYS[stage]}.yaml")] if stage in OVERLAYS else []
    with pytest.raises(SystemExit) as done:
        main(["fit", *under, "-c", str(FOLDER / "extended" / f"{stage}.yaml"), "--print_config"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["output"] == f"runs/extended/{stage}"
    assert "runs/demo/" not in printed


EXPERTS = ("expert_image.yaml", "expert_speech.yaml")


@pytest.mark.parametrize(
    ("folder", "experts"),
    [("", EXPERTS), ("extended/", (*EXPERTS, "extended/expert_video.yaml", "extended/expert_audio.yaml"))],
    ids=["demo", "extended"],
)
def test_the_control_has_as_many_steps_and_of_each_file_as_many_samples(folder, experts):
    def data(name):
        return yaml.safe_load((FOLDER / name).read_text())["data"]

    mixture, dense = [data(name) for name in (f"{folder}moe.yaml", *experts)], data(f"{folder}dense.yaml")
    assert dense["steps"] == sum(stage["steps"] for stage in mixture)
    seen = Counter()
    for stage in mixture:
        seen.update({Path(file).name: stage["steps"] * number for file, number in stage["train"].items()})
    given = {Path(file).name: number for file, number in dense["train"].items()}
    # whole numbers of a batch, and something of everything
    assert given == {file: max(1, round(count / dense["steps"])) for file, count in seen.items()}


def test_the_extended_mixture_hears_and_sees():
    manifest = read_manifest(FOLDER / "extended" / "assemble.yaml")
    assert set(manifest.connectors) == {"image", "speech", "video", "audio"}
