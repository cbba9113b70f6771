"""Two processes (gloo) are as one with the same global batch, however they share weights and work."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from unimoe.commands.consolidate import consolidate
from unimoe.model.loading import load_model
from unimoe.stages.cli import main
from unimoe.testing import IMAGE, SPEECH, assert_same_run, run_together

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS = 8
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
        "checkpoint_every": 2,
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


def fit_here(run: dict):
    """Run a stage in this process."""
    path = Path(run["output"] + ".yaml")
    path.write_text(yaml.safe_dump(run))
    main(["fit", "-c", str(path)])


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """The folder of a run by one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    fit_here(settings(world, output, 1, "auto"))
    return output


def divided(exchange: str) -> dict:
    init = {"expert_parallel": 2, "exchange": exchange}
    return {"class_path": "unimoe.training.sharding.FSDP2Strategy", "init_args": init}


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


def test_accumulated_batches_count_as_those_of_one_process(world, tmp_path):
    runs = {
        name: settings(world, tmp_path / name, ranks, strategy)
        for name, ranks, strategy in (("alone", 1, "auto"), ("ddp", 2, "ddp"), ("fsdp2", 2, "fsdp2"))
    }
    for run in runs.values():
        run["data"]["steps"] = STEPS // 2
        run["trainer"]["accumulate_grad_batches"] = 2
    fit_here(runs["alone"])
    fit(2, runs["ddp"], runs["fsdp2"])
    for name in ("ddp", "fsdp2"):
        assert_same_run(tmp_path / name, tmp_path / "alone")


def test_ranks_with_more_sub_batches_than_others_train_as_one(world, tmp_path):
    """A long sample is a sub-batch, or a packed row, of its own; sharded blocks must run equally often."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": [{**turns[0], "content": "q" * n}, turns[1]]} for n in (3, 300, 3, 3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs = {}
    for name, ranks, strategy in (("alone", 1, "auto"), ("fsdp2", 2, "fsdp2"), ("packed", 2, "fsdp2")):
        runs[name] = settings(world, tmp_path / name, ranks, strategy)
        runs[name]["data"] |= {"train": str(tmp_path / "train.jsonl"), "val": None, "steps": 4}
    runs["packed"]["data"]["pack"] = 64
    fit_here(runs["alone"])
    fit(2, runs["fsdp2"], runs["packed"])
    for name in ("fsdp2", "packed"):
        assert_same_run(tmp_path / name, tmp_path / "alone")


def test_a_selection_bias_follows_the_load_of_all_ranks_and_micro_batches(world, tmp_path):
    """Each step moves it by the rate or not at all, so a load that is not the whole step's shows at once."""
    router = {"kind": "top_k", "score": "sigmoid", "bias": "scores", "bias_rate": 0.01}
    losses = {"balance": 0, "sequence_balance": 0.01}
    moe = {"router": router, "experts": {"copies": 4}, "placement": "all", "losses": losses}
    runs = {
        name: settings(world, tmp_path / name, ranks, strategy, moe=moe)
        for name, ranks, strategy in (("alone", 1, "auto"), ("ddp", 2, "ddp"), ("fsdp2", 2, "fsdp2"))
    }
    for run in runs.values():
        run["data"]["steps"] = 6
        run["trainer"]["accumulate_grad_batches"] = 2
    fit_here(runs["alone"])
    fit(2, runs["ddp"], runs["fsdp2"])
    biases = {}
    for name in runs:
        tensors = load_file(tmp_path / name / "model.safetensors")
        biases[name] = torch.stack([t for key, t in sorted(tensors.items()) if key.endswith("router.bias")])
    assert biases["alone"].abs().max() >= 0.02
    for name in runs:
        torch.testing.assert_close(biases[name], biases["alone"], rtol=0, atol=1e-6, msg=name)


def test_gradient_conflicts_are_those_of_all_ranks_and_micro_batches(world, tmp_path):
    moe = {"preset": "cdsp", "router": {"drop": 0.0}, "experts": {"copies": 4}, "placement": "all"}
    runs = {
        name: settings(world, tmp_path / name, ranks, strategy, moe=moe)
        for name, ranks, strategy in (("alone", 1, "auto"), ("ddp", 2, "ddp"))
    }
    for run in runs.values():
        run["data"]["steps"] = 4
        run["trainer"]["accumulate_grad_batches"] = 2
    fit_here(runs["alone"])
    fit(2, runs["ddp"])
    alone, ddp = (load_file(tmp_path / name / "model.safetensors") for name in runs)
    kept = [name for name in alone if ".layers.1." in name and name.endswith(("conflict_EE", "topology"))]
    assert len(kept) == 2 and all(alone[name].any() for name in kept)
    for name in kept:
        torch.testing.assert_close(ddp[name], alone[name], rtol=1e-3, atol=1e-4, msg=name)


def assert_same_weights(run: Path, model: Path):
    """What is consolidated is what torch's own converter finds in the shards."""
    consolidate(str(run), str(model))
    dcp_to_torch_save(run / "checkpoints" / "last.ckpt", model / "whole.pt")
    held = torch.load(model / "whole.pt", weights_only=True)["state_dict"]
    found = load_model(model)[0].state_dict()
    whole = {name: tensor for name, tensor in held.items() if ".lora_" not in name}
    assert any(".experts." in name for name in whole) and len(whole) < len(held)
    for name, tensor in whole.items():
        torch.testing.assert_close(found[name.removeprefix("model.")], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)], ids=["2 to 1", "1 to 2"])
def test_a_sharded_checkpoint_goes_on_with_other_ranks(world, alone, tmp_path, ranks):
    output = tmp_path / "run"
    run = settings(world, output, ranks[0], "fsdp2")
    stop = {"class_path": "unimoe.testing.StopAfter", "init_args": {"step": 5}}
    run["trainer"]["callbacks"] = [stop]
    assert "stopped" in fit(ranks[0], run)
    assert (output / "checkpoints" / "last.ckpt").is_dir()
    if ranks[0] == 2:
        assert_same_weights(output, tmp_path / "model")
    damaged = ranks[0] == 2
    if damaged:  # the newest is cut short: the one before it, of step 4, takes its place
        piece = max((output / "checkpoints" / "last.ckpt").glob("*.distcp"))
        piece.write_bytes(piece.read_bytes()[:-100])
    strategy = "fsdp2" if ranks[1] > 1 else "auto"
    said = fit(ranks[1], settings(world, output, ranks[1], strategy))
    assert f"resuming after step {4 if damaged else 5} of {STEPS}" in said
    assert ("is damaged" in said) == damaged
    assert_same_run(output, alone)
