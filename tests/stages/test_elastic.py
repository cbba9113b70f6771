"""Runs under torchrun whose processes die end as those that were left alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from unimoe.testing import IMAGE, SPEECH, assert_same_run
from unimoe.training.resume import saved_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, EVERY = 60, 7


def run(world: Path, output: Path, restarts: int = 0, die: tuple[int, int] | None = None):
    """``unimoe fit`` in two processes, of which one dies at the given step; status and what they said."""
    settings = {
        "stage": "moe",
        "output": str(output),
        "checkpoint_every": EVERY,
        "model": {
            "llm": str(world / "llm"),
            "modalities": {"image": IMAGE, "speech": SPEECH},
            "moe": {"num_experts": 2, "placement": "all", "balance_coef": 0.1},
            "trainable": [{"match": ["model.connectors.*", "*.mlp.router.*"], "lr": 1e-3}],
            "lora": [{"layers": "attention", "rank": 2, "lr": 1e-2}],
        },
        "data": {"train": str(world / "train.jsonl"), "steps": STEPS, "batch_size": 2},
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "fsdp2"},
    }
    if die:
        init = {"step": die[0], "rank": die[1]}
        settings["trainer"]["callbacks"] = [{"class_path": "unimoe.testing.DieAt", "init_args": init}]
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    fit = ["--max-restarts", str(restarts), "-m", "unimoe", "fit", "-c", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *fit],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1200,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    status, said = run(world, output)
    assert status == 0, said
    return output


def test_a_process_that_is_killed_is_started_again(world, undisturbed, tmp_path):
    status, said = run(world, tmp_path / "run", restarts=1, die=(30, 1))
    assert status == 0, said
    assert re.search(f"moe: resuming after step (21|28) of {STEPS}", said), said  # 28 may be in the making
    assert_same_run(tmp_path / "run", undisturbed)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_without_its_newest_checkpoint_goes_on_from_the_one_before(world, undisturbed, tmp_path):
    status, said = run(world, tmp_path / "run", die=(30, 0))
    assert status != 0 and "exitcode: -9" in said, said
    newest = tmp_path / "run" / "checkpoints" / "last.ckpt"
    begun = saved_step(newest) - EVERY
    piece = max(newest.glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-100])
    status, said = run(world, tmp_path / "run")
    assert status == 0, said
    assert f"last.ckpt is damaged ({piece.name} has" in said
    assert f"resuming from the previous one, of step {begun}" in said
    assert f"moe: resuming after step {begun} of {STEPS}" in said
    assert_same_run(tmp_path / "run", undisturbed)
