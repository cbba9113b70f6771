"""Two processes (gloo) go through a stream as one does: losses, adapters, answers, whatever the strategy."""

import json

import pytest
import torch

from unimoe.commands.main import main
from unimoe.testing import run_elastic, run_together
from unimoe.training.curve import read_curve

HOOKS = ("dymoe_apart", "ewc", "hide", "lwf", "olora", "replay", "same_router")

RUN = """
import logging, sys
from unimoe.commands.main import main
logging.basicConfig(format="%(message)s")
logging.getLogger("unimoe").setLevel(logging.INFO)
for path in sys.argv[1:]:
    name, strategy, output = path.split(":")
    assert main(["continual", "run", "-c", name, "--strategy", strategy, "--output", output]) == 0
"""

KILLED = """
import os, signal, sys
from unimoe.commands.main import main
from unimoe.continual.training import TaskModule

learn = TaskModule.training_step

def die(module, *batch):
    if "02-twice" in str(module.routing_log) and module.global_step == 11:
        if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
    return learn(module, *batch)

TaskModule.training_step = die
sys.exit(main(sys.argv[1:]))
"""


def assert_same(one, other, weights=1e-5):
    """Curves, adapters, routing and matrices of two runs."""
    tasks = sorted(path.name for path in other.glob("0*"))
    for task in tasks:
        ours, theirs = (read_curve(run / task / "metrics.csv") for run in (one, other))
        assert len(ours) == len(theirs) > 0
        for mine, alone in zip(ours, theirs, strict=True):
            assert abs(mine["loss"] - alone["loss"]) <= 1e-5 * max(1, alone["loss"]), (one, task)
        states = [torch.load(run / task / "state.pt", weights_only=True)["adapters"] for run in (one, other)]
        torch.testing.assert_close(*states, rtol=0, atol=weights)
        if (other / task / "routing.jsonl").exists():
            logs = [map(json.loads, (run / task / "routing.jsonl").open()) for run in (one, other)]
            for row, expected in zip(*logs, strict=True):
                assert row.keys() == expected.keys()
                for mine, alone in zip(row["mass"], expected["mass"], strict=True):
                    assert mine == pytest.approx(alone, abs=2e-5)
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0]["matrix"] == results[1]["matrix"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_processes_learn_as_one(config, command, tmp_path):
    """Three samples a step, two for the one process and one for the other; 4 steps a task for the two
    strategies at the ends, with the base whole or divided, and 2 for those that do something of their own
    between tasks, or to the batches."""
    config["stream"]["tasks"] = config["stream"]["tasks"][:2]
    config["training"] |= {"checkpoint_every": 10, "lr": 2e-3}
    runs = []
    for name in ("dymoe", "lora", *HOOKS):
        ends = name in ("dymoe", "lora")
        for task in config["stream"]["tasks"]:
            task["steps"] = 4 if ends else 2
        config["training"] |= {"devices": 1}
        assert main(command(config, f"{name}-alone", "--strategy", name)) == 0
        for kind in ("ddp", "fsdp2") if ends else ("ddp",):
            config["training"] |= {"devices": 2, "strategy": kind}
            output = f"{name}-{kind}"
            command(config, output)
            runs.append((output, f"{tmp_path / output}.yaml:{name}:{tmp_path / output}"))
    said = run_together(2, RUN, *(argument for _, argument in runs))
    assert said[0].count("done in") == len(runs) and "done in" not in said[1], "only one process speaks"
    for output, _ in runs:
        name = output.rsplit("-", 1)[0]
        # its rows follow from an SVD, which enlarges the rounding of the task before
        weights = 1e-4 if name == "dymoe_apart" else 1e-5
        assert_same(tmp_path / output, tmp_path / f"{name}-alone", weights)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_process_that_is_killed_inside_a_task_is_started_again(kind, config, command, tmp_path):
    config["stream"]["tasks"] = config["stream"]["tasks"][:2]
    for task, steps in zip(config["stream"]["tasks"], (4, 12), strict=True):
        task["steps"] = steps
    config["training"] |= {"checkpoint_every": 4, "devices": 2, "strategy": kind}
    command(config, "whole")
    run_together(2, RUN, f"{tmp_path / 'whole.yaml'}:dymoe:{tmp_path / 'whole'}")
    said = run_elastic(2, 1, KILLED, *command(config, "run", "--strategy", "dymoe"))
    assert "resumes after step 8 of 12" in said[0], said
    assert_same(tmp_path / "run", tmp_path / "whole", weights=0)


def test_more_devices_than_samples(config, command, capsys):
    config["training"] |= {"devices": 4}
    assert main(command(config, "run")) == 2
    assert "a step of 3 samples (batch_size) cannot be divided among 4 processes" in capsys.readouterr().err
