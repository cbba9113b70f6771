"""Presets of configs/moe train in a stage, on two processes and, after a stop, on one."""

from pathlib import Path

import pytest
import yaml

from unimoe.model.loading import load_model
from unimoe.moe.settings import presets
from unimoe.testing import IMAGE, SPEECH, assert_same_run, run_together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, STOP = 4, 2
REFUSED = {"switch_dit", "uoe"}
"""By a causal LM: one needs a condition of each sample, the other's slices see later tokens."""
SAME_PARTS = {"copies_top2", "deepseek_moe", "deepseek_moe_16b", "glm4", "mixtral", "sliced", "sliced_free"}
"""Other numbers for parts that another preset has."""
OWN_CHOICES = {
    "cdsp": "each process draws when to hide the task",
    "evomoe": "each process draws its own noise",
    "mofme": "each process draws its own dropout",
    "switch": "the capacity is that of a process's own tokens",
    "z_code_m3": "the capacity is that of a process's own tokens",
}
"""Why two processes do not train as one."""
FIT = """
import sys
from unimoe.stages.cli import main
for path in sys.argv[1:]:
    try:
        main(["fit", "-c", path])
    except KeyboardInterrupt:
        pass
"""


def settings(world: Path, output: Path, preset: str) -> dict:
    return {
        "stage": "moe",
        "output": str(output),
        "checkpoint_every": STOP,
        "model": {
            "llm": str(world / "llm"),
            "modalities": {"image": IMAGE, "speech": SPEECH},
            "moe": {"preset": preset, "placement": "all"},
            "trainable": [{"match": ["model.connectors.*", "*.layers.*.mlp.*"], "lr": 3e-4}],
        },
        "data": {"train": str(world / "train.jsonl"), "steps": STEPS, "batch_size": 4},
        "trainer": {"accelerator": "cpu", "devices": 1},
    }


def fit(folder: Path, ranks: int, runs: list[dict]):
    paths = []
    for run in runs:
        paths.append(folder / f"{Path(run['output']).name}-{ranks}.yaml")
        paths[-1].write_text(yaml.safe_dump(run))
    run_together(ranks, FIT, *map(str, paths))


def on_two(run: dict) -> dict:
    """The first half of a run, by two processes."""
    stop = {"class_path": "unimoe.testing.StopAfter", "init_args": {"step": STOP}}
    trainer = {**run["trainer"], "devices": 2, "strategy": "ddp", "callbacks": [stop]}
    return {**run, "data": {**run["data"], "batch_size": 2}, "trainer": trainer}


def test_every_preset_trains_on_two_processes_and_resumes_on_one(world, tmp_path):
    names = sorted(set(presets()) - REFUSED - SAME_PARTS)
    straight = [settings(world, tmp_path / name, name) for name in names if name not in OWN_CHOICES]
    moved = [settings(world, tmp_path / f"{name}-moved", name) for name in names]
    fit(tmp_path, 1, straight)
    fit(tmp_path, 2, [on_two(run) for run in moved])
    assert not list(tmp_path.glob("*-moved/model.safetensors"))
    fit(tmp_path, 1, moved)
    for name in names:
        load_model(tmp_path / f"{name}-moved")
        if name not in OWN_CHOICES:
            # Adam makes of the rounding of the smallest gradients up to a tenth of a step, which is 3e-4
            assert_same_run(tmp_path / f"{name}-moved", tmp_path / name, weights_within=1e-4)
