"""Two processes (gloo) are as one with the same global batch, however they share weights and work."""

from pathlib import Path

import pytest
import yaml

from unimoe.testing import IMAGE, SPEECH, assert_same_run, run_together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS = 20
FIT = """
import logging
import sys
from unimoe.stages.cli import main
logging.basicConfig(format="%(message)s")
logging.getLogger("unimoe").setLevel(logging.INFO)
for path in sys.argv[1:]:
    try:
        main(["fit", "-c", path])
    except KeyboardInterrupt:
        print("stopped", path)
"""


def settings(world: Path, output: Path, ranks: int, strategy, **model) -> dict:
    """Connectors, routers, one layer's experts and adapters train; 4 samples a step; every auxiliary loss."""
    return {
        "stage": "moe",
        "output": str(output),
        "checkpoint_every": 5,
        "model": {
            "llm": str(world / "llm"),
            "modalities": {"image": IMAGE, "speech": SPEECH},
            "moe": {"num_experts": 4, "placement": "all", "balance_coef": 0.1, "z_coef": 0.001},
            "trainable": [
                {"match": ["model.connectors.*", "*.mlp.router.*"], "lr": 1e-3},
                {"match": "*.layers.1.mlp.experts.*", "lr": 1e-3},
            ],
            "lora": [{"layers": "attention", "rank": 2, "lr": 1e-2}],
            **model,
        },
        "data": {
            "train": str(world / "train.jsonl"),
            "val": str(world / "train.jsonl"),
            "steps": STEPS,
            "batch_size": 4 // ranks,
        },
        "trainer": {"accelerator": "cpu", "devices": ranks, "strategy": strategy},
    }


def fit(ranks: int, *runs: dict) -> str:
    """Run several stages one after the other in as many processes; returns what they said."""
    paths = []
    for run in runs:
        paths.append(Path(run["output"] + ".yaml"))
        paths[-1].write_text(yaml.safe_dump(run))
    return run_together(ranks, FIT, *map(str, paths))[0]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """The folder of a run by one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    fit(1, settings(world, output, 1, "auto"))
    return output


def divided(exchange: str) -> dict:
    init = {"expert_parallel": 2, "exchange": exchange}
    return {"class_path": "unimoe.training.sharding.Sharded", "init_args": init}


def test_two_processes_train_as_one(world, alone, tmp_path):
    """Each with the whole model; with half of it, its blocks run again in the backward pass; with half of the
    experts, tokens of its own and the same tokens."""
    runs = {
        "ddp": settings(world, tmp_path / "ddp", 2, "ddp"),
        "fsdp2": settings(world, tmp_path / "fsdp2", 2, "fsdp2", gradient_checkpointing=True),
        "all_to_all": settings(world, tmp_path / "all_to_all", 2, divided("all_to_all")),
        "all_reduce": settings(world, tmp_path / "all_reduce", 2, divided("all_reduce")),
    }
    runs["all_reduce"]["data"]["batch_size"] = 4  # both see the same
    fit(2, *runs.values())
    for run in runs.values():
        assert_same_run(Path(run["output"]), alone)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=["2 to 1", "1 to 2"])
def test_a_sharded_checkpoint_goes_on_with_other_ranks(world, alone, tmp_path, ranks):
    output = tmp_path / "run"
    run = settings(world, output, ranks[0], "fsdp2")
    stop = {"class_path": "unimoe.testing.StopAfter", "init_args": {"step": 12}}
    run["trainer"]["callbacks"] = [stop]
    assert "stopped" in fit(ranks[0], run)
    assert (output / "checkpoints" / "last.ckpt").is_dir()
    damaged = ranks[0] == 2
    if damaged:  # the newest is cut short: the one before it, of step 10, takes its place
        piece = max((output / "checkpoints" / "last.ckpt").glob("*.distcp"))
        piece.write_bytes(piece.read_bytes()[:-100])
    strategy = "fsdp2" if ranks[1] > 1 else "auto"
    said = fit(ranks[1], settings(world, output, ranks[1], strategy))
    assert f"going on after step {10 if damaged else 12} of {STEPS}" in said
    assert ("is damaged" in said) == damaged
    assert_same_run(output, alone)
