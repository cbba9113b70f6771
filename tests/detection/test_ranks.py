"""Two processes are as one: pictures, prompts, losses, gradients, experts' balance and average precision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from unimoe import cli


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_as_one(settings, folder, world, tmp_path):
    """MoE-Tuning by the command line: one process with batches of 6, two (gloo) with batches of 3.

    The eighth of eight pictures makes a batch of two. Denoising queries are drawn by each process for itself,
    so they are left out.
    """
    settings["model"] = {
        "init_from": str(folder),
        "moe": {"copies": 2, "slices": 2, "balance_coef": 0.1},
        "denoising": {"queries": 0},
        "lr": 1e-3,
    }
    settings["data"] |= {"steps": 4, "cache_features": True, "copies": 2}
    results = []
    for ranks in (1, 2):
        run = json.loads(json.dumps(settings))
        run["output"] = str(tmp_path / f"by{ranks}")
        run["data"] |= {"batch_size": 6 // ranks, "cache_features": str(tmp_path / f"features{ranks}")}
        run["trainer"] = {"accelerator": "cpu", "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
        path = tmp_path / f"by{ranks}.yaml"
        path.write_text(yaml.safe_dump(run))
        if ranks == 1:
            assert cli.main(["fit", "-c", str(path)]) == 0
        else:
            command = [sys.executable, "-m", "unimoe", "fit", "-c", str(path)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
            assert done.returncode == 0, done.stderr
            assert done.stderr.count("finished after") == 1, "only one process speaks"
        metrics = json.loads(Path(run["output"], "stage.json").read_text())["metrics"]
        results.append((load_file(Path(run["output"], "model.safetensors")), metrics))
    (one, alone), (other, shared) = results
    start = load_file(folder / "model.safetensors")
    moved = [name for name in start.keys() & one.keys() if not one[name].equal(start[name])]
    assert any(name.startswith("decoder.box_heads") for name in moved) and one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=2e-5, rtol=1e-3)
    assert shared["val/AP"] == pytest.approx(alone["val/AP"], abs=1e-6)
