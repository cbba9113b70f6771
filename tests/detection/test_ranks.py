"""Two processes (gloo) are as one with the same global batch, however they share weights and experts."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from unimoe.commands import main as cli
from unimoe.testing import assert_same_run, run_together

FIT = """
import sys
from unimoe.commands.main import main
for path in sys.argv[1:]:
    assert main(["fit", "-c", path]) == 0
"""


def divided(exchange: str) -> dict:
    init = {"expert_parallel": 2, "exchange": exchange}
    return {"class_path": "unimoe.training.sharding.FSDP2Strategy", "init_args": init}


STRATEGIES = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "all_to_all": divided("all_to_all"),
    "all_reduce": divided("all_reduce"),
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_processes_train_as_one(settings, folder, world, tmp_path):
    """MoE-Tuning by the command line: one process with batches of 6, two with batches of 3, or of the same 6.

    The router's fresh rows lie far apart, or rounding would decide between slices of copies that are as near.
    Denoising queries are drawn by each process for itself, so they are left out.
    """
    settings["model"] = {
        "init_from": str(folder),
        "moe": {"copies": 2, "slices": 2, "balance_coef": 0.1, "router_init_std": 1.0},
        "denoising": {"queries": 0},
        "lr": 3e-4,
    }
    settings["data"] |= {"steps": 4, "copies": 2}

    def write(name: str, ranks: int, strategy) -> Path:
        run = json.loads(json.dumps(settings))
        run["output"] = str(tmp_path / name)
        alike = name == "all_reduce"  # both see the same
        run["data"] |= {"batch_size": 6 if alike else 6 // ranks}
        run["data"]["cache_features"] = str(tmp_path / f"features{ranks}")
        run["trainer"] = {"accelerator": "cpu", "devices": ranks, "strategy": strategy}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    assert cli.main(["fit", "-c", str(write("alone", 1, "auto"))]) == 0
    said = run_together(2, FIT, *(str(write(name, 2, kind)) for name, kind in STRATEGIES.items()))
    assert "finished after" in said[0] and "finished after" not in said[1], "only one process speaks"
    start, alone = load_file(folder / "model.safetensors"), load_file(tmp_path / "alone/model.safetensors")
    moved = [name for name in start.keys() & alone.keys() if not alone[name].equal(start[name])]
    assert any(name.startswith("decoder.box_heads") for name in moved)
    for name in STRATEGIES:
        assert_same_run(tmp_path / name, tmp_path / "alone")
        trained = [
            json.loads((tmp_path / run / "stage.json").read_text())["parameters"] for run in (name, "alone")
        ]
        assert trained[0] == trained[1]
