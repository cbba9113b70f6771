"""A run that torchrun starts, and runs whose processes die, under torchrun's agent or without it: all end
the same."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from unimoe.testing import IMAGE, SPEECH, assert_same_run, run_elastic, run_together
from unimoe.training.resume import saved_step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, EVERY, DEATH = 12, 3, 10
FIT = """
import sys
from unimoe.commands.main import main
sys.exit(main(["fit", "-c", sys.argv[1]]))
"""


def write(world: Path, output: Path, die: tuple[int, int] | None = None) -> str:
    """The settings of a run in two processes, of which one dies at the given step."""
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
    return str(file)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "unimoe", "fit", "-c", write(world, output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=1200,
    )
    assert done.returncode == 0 and done.stdout.count("moe: finished after") == 1, done.stdout
    return output


def test_a_process_that_is_killed_is_started_again(world, undisturbed, tmp_path):
    said = run_elastic(2, 1, FIT, write(world, tmp_path / "run", die=(DEATH, 1)))[0]
    newest = DEATH - 1  # or the one before it, where this was in the making
    assert re.search(f"moe: resuming after step ({newest - EVERY}|{newest}) of {STEPS}", said), said
    assert_same_run(tmp_path / "run", undisturbed)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_without_its_newest_checkpoint_goes_on_from_the_one_before(world, undisturbed, tmp_path):
    with pytest.raises(RuntimeError, match="exit codes: -9, "):
        run_together(2, FIT, write(world, tmp_path / "run", die=(DEATH, 0)))
    newest = tmp_path / "run" / "checkpoints" / "last.ckpt"
    begun = saved_step(newest) - EVERY
    piece = max(newest.glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-100])
    said = run_together(2, FIT, write(world, tmp_path / "run"))[0]
    assert f"last.ckpt is damaged ({piece.name} has" in said
    assert f"resuming from the previous one, of step {begun}" in said
    assert f"moe: resuming after step {begun} of {STEPS}" in said
    assert_same_run(tmp_path / "run", undisturbed)
