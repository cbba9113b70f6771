"""A stage that is killed goes on where it was, and ends as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from unimoe.commands.consolidate import consolidate
from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.stages.cli import main
from unimoe.testing import IMAGE, SPEECH, assert_same_run, run_together
from unimoe.training.curve import read_curve
from unimoe.training.resume import latest_checkpoint, saved_step

STEPS = 40
STOP = {"class_path": "unimoe.testing.StopAfter", "init_args": {"step": 4}}
DIE = {"class_path": "unimoe.testing.DieAt", "init_args": {"step": 17, "rank": 0}}
FIT = """
import sys
from unimoe.stages.cli import main
main(["fit", "-c", sys.argv[1]])
"""


def settings(world: Path, output: Path) -> dict:
    """A sparse model with dropout: adapters on attention and experts, routers and their bias, connectors."""
    return {
        "stage": "moe",
        "output": str(output),
        "checkpoint_every": 3,
        "model": {
            "llm": str(world / "llm"),
            "modalities": {"image": IMAGE, "speech": SPEECH},
            "moe": {
                "router": {"kind": "top_k", "k": 1, "gating": "softmax_topk", "bias": "scores"},
                "experts": {"copies": 2},
                "placement": "all",
            },
            "trainable": [
                {"match": "model.connectors.*", "lr": 1e-3},
                {"match": "*.mlp.router.*", "lr": 1e-3},
            ],
            "lora": [
                {"layers": "attention", "rank": 2, "dropout": 0.2, "lr": 1e-2},
                {"layers": "experts", "rank": 2, "lr": 1e-2},
            ],
        },
        "data": {
            "train": str(world / "train.jsonl"),
            "val": str(world / "train.jsonl"),
            "steps": STEPS,
            "batch_size": 2,
        },
    }


def command(world: Path, folder: Path, output: Path) -> list[str]:
    path = folder / "moe.yaml"
    path.write_text(yaml.safe_dump(settings(world, output)))
    return ["fit", "-c", str(path)]


def start(args: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "unimoe", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(process: subprocess.Popen, output: Path, step: int):
    """Until the curve shows that a step is over."""
    end = time.monotonic() + 500
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[0]
        rows = read_curve(output / "logs" / "metrics.csv")
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


@pytest.mark.slow
def test_kill_9_changes_nothing(world, tmp_path, caplog):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(command(world, tmp_path, whole))

    args = command(world, tmp_path, killed)
    dies = settings(world, killed) | {"trainer": {"callbacks": [DIE]}}
    (tmp_path / "dies.yaml").write_text(yaml.safe_dump(dies))
    with pytest.raises(RuntimeError, match="exit codes: -9$"):
        run_together(1, FIT, str(tmp_path / "dies.yaml"))
    assert not (killed / "stage.json").exists()
    found = latest_checkpoint(killed / "checkpoints" / "last.ckpt")
    assert found is not None
    begun = found[1]
    assert 15 <= begun < STEPS
    main(args)
    assert f"resuming after step {begun} of {STEPS}" in caplog.text

    assert_same_run(killed, whole)


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_says_how_to_go_on(world, tmp_path):
    output = tmp_path / "output"
    process = start(command(world, tmp_path, output))
    wait_for_step(process, output, 1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 130, said
    step = saved_step(output / "checkpoints" / "last.ckpt")
    assert step == len(read_curve(output / "logs" / "metrics.csv"))
    assert f"stopped after step {step} of {STEPS}; the same command resumes from there" in said
    assert "Traceback" not in said


def test_the_checkpoint_of_an_unfinished_run_becomes_a_model(world, tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    unfinished = settings(world, run) | {"trainer": {"callbacks": [STOP]}}
    path = tmp_path / "unfinished.yaml"
    path.write_text(yaml.safe_dump(unfinished))
    with pytest.raises(KeyboardInterrupt):
        main(["fit", "-c", str(path)])
    before = sorted(run.rglob("*"))
    consolidate(str(run), str(model))
    record = json.loads((model / "stage.json").read_text())
    assert record["steps"] == 4 and record["settings"] == json.loads((run / "settings.json").read_text())
    held = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    found = load_model(model)[0].state_dict()
    trained = [name for name in held if name.removeprefix("model.") in found]
    assert len(trained) > 4
    for name in trained:
        torch.testing.assert_close(found[name.removeprefix("model.")], held[name], rtol=0, atol=0)
    assert sorted(run.rglob("*")) == before
    for wrong, message in (([run, model], "is there already"), ([model, run / "x"], "holds no checkpoints")):
        with pytest.raises(UserError, match=message):
            consolidate(*map(str, wrong))


def test_a_damaged_checkpoint_is_named(world, tmp_path):
    output = tmp_path / "output"
    (output / "checkpoints").mkdir(parents=True)
    (output / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match=r"last\.ckpt is damaged .*delete it"):
        main(command(world, tmp_path, output))


def test_other_settings_do_not_go_on(world, tmp_path):
    output = tmp_path / "output"
    (output / "checkpoints").mkdir(parents=True)
    args = command(world, tmp_path, output)
    (output / "settings.json").write_text('{"stage": "another"}')
    (output / "checkpoints" / "last.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="made with other settings"):
        main(args)
