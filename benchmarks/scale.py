"""``make bench ARGS="scale"``: training throughput and memory by distributed strategy.

The two processes share this machine (one thread each, gloo), so the results show the overhead of a strategy,
not its scaling over machines. The model is a random LLaMA of ``--layers`` and ``--hidden`` with 4 experts in
every second layer. ``--accelerator gpu`` runs on GPUs. Prints a table.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import yaml

from unimoe.testing import run_together, save_tiny_llm
from unimoe.training.curve import read_curve

RUN = """
import resource, sys
from unimoe.stages.cli import main
main(["fit", "-c", sys.argv[1]])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def sharded(**settings) -> dict:
    return {"class_path": "unimoe.training.sharding.FSDP2Strategy", "init_args": settings}


STRATEGIES = {
    "single process": (1, "auto"),
    "ddp": (2, "ddp"),
    "fsdp2": (2, "fsdp2"),
    "experts, all_to_all": (2, sharded(expert_parallel=2, exchange="all_to_all")),
    "experts, all_reduce": (2, sharded(expert_parallel=2, exchange="all_reduce")),
}


def write_inputs(folder: Path, layers: int, hidden: int) -> None:
    """Write a random LLM and a file of conversations."""
    save_tiny_llm(folder / "llm", layers, hidden)
    turns = [
        {"role": "user", "content": "count " * 20},
        {"role": "assistant", "content": "one two three " * 10},
    ]
    (folder / "train.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 64))


def measure(folder: Path, name: str, steps: int, accelerator: str) -> tuple[float, float, float]:
    """Train for a few steps.

    Returns:
        Tokens per second (median over the steps), and peak memory in MB of the first process, which builds
        the model, and of the last.
    """
    ranks, strategy = STRATEGIES[name]
    output = folder / name.replace(", ", "_")
    batch = 8 if name.endswith("all_reduce") else 8 // ranks
    run = {
        "stage": "scale",
        "output": str(output),
        "model": {
            "llm": str(folder / "llm"),
            "moe": {"experts": {"copies": 4}, "placement": "interval"},
            "trainable": [{"match": "*.mlp.*", "lr": 1e-4}],
        },
        "data": {"train": str(folder / "train.jsonl"), "steps": steps, "batch_size": batch},
        "trainer": {"accelerator": accelerator, "devices": ranks, "strategy": strategy},
    }
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(run))
    outputs = run_together(ranks, RUN, str(file))
    peaks = [int(text.rsplit("peak", 1)[1].split()[0]) / 1024 for text in outputs]
    speeds = [row.get("train/tokens_per_second") for row in read_curve(output / "logs" / "metrics.csv")]
    return median(speed for speed in speeds if speed is not None), peaks[0], peaks[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    given = parser.parse_args()
    print(f"{'strategy':22}{'processes':>10}{'tokens/s':>10}{'MB, first':>10}{'MB, last':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        write_inputs(Path(temporary), given.layers, given.hidden)
        for name in given.strategies:
            found = measure(Path(temporary), name, given.steps, given.accelerator)
            print(f"{name:22}{STRATEGIES[name][0]:10}" + "".join(f"{one:10.0f}" for one in found), flush=True)


if __name__ == "__main__":
    main()
