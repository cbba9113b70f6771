"""``make bench ARGS="same_losses COMMIT"``: does this tree train to the same losses as an earlier commit?

Checks COMMIT out into a temporary git worktree and runs the same ``unimoe`` commands in both trees, side by
side, each with one thread and the experts' loops in Python (a native library fits one version of its source):

align      the demo's data and the 20 steps of its first stage, on the default parts
continual  lora, incmoelora and dymoe on three small text tasks and a random LLM
detection  a small detector and its MoE tuning on generated scenes

Every value of every curve and every accuracy matrix must be equal to the last digit. The losses of dymoe may
differ by rounding, its accuracy matrix may not. The matrices are printed, so that one can see that something
was learned. The exit status is 1 if anything else differs. Training needs about five minutes on two cores.
"""

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from unimoe.testing import save_tiny_llm

ROOT = Path(__file__).parents[1]
STRATEGIES = {"lora": (0.02, 40), "incmoelora": (0.02, 40), "dymoe": (0.005, 150)}
"""Learning rate and steps of each task. DyMoE has a lower rate because Adam amplifies rounding: at 0.02 a
relative difference of 1e-7 in the second task grows to 0.4 in the third."""
SETTINGS = {"dymoe": {"temperature": 0.1}}
"""Settings of the strategies. At DyMoE's own temperature, 0.01, it learns no task at this rate."""
TOLERANCE = {"dymoe": 1e-6}
"""Allowed relative difference of a run's losses; 0 for all other runs."""
WORDS = ("dog", "cat", "owl", "fox", "bee", "cow")
TASKS = {"upper": str.upper, "twice": lambda word: word + word, "last": lambda word: word[-1]}

Curve = dict[tuple[int, str], float]
"""Value by step and column."""


class Tree:
    """One checkout: runs its commands in a folder of its own."""

    def __init__(self, code: Path, folder: Path):
        self.code, self.folder = code, folder
        folder.mkdir(parents=True)

    def start(self, *args: str) -> subprocess.Popen[str]:
        """Start ``unimoe ARGS`` in the folder, its output in log.txt."""
        settings = {"PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1", "UNIMOE_NATIVE": "0"}
        with (self.folder / "log.txt").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "unimoe", *args],
                cwd=self.folder,
                env={**os.environ, **settings},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def failed(self, args: tuple[str, ...]) -> SystemExit:
        tail = "\n".join((self.folder / "log.txt").read_text().splitlines()[-20:])
        return SystemExit(f"unimoe {' '.join(args)} failed in {self.code}:\n{tail}")


def run(trees: list[Tree], *args: str, until: str | None = None) -> None:
    """Run ``unimoe ARGS`` in all trees at once.

    Args:
        trees: where to run it.
        args: verb and flags; paths are relative to the tree's folder.
        until: a file; once it exists the command is killed and counts as successful.
    """
    processes = [tree.start(*args) for tree in trees]
    try:
        for tree, process in zip(trees, processes, strict=True):
            while process.poll() is None:
                if until and (tree.folder / until).is_file():
                    process.kill()
                time.sleep(0.2)
            reached = until is not None and (tree.folder / until).is_file()
            if process.returncode and not reached:
                raise tree.failed(args)
    finally:
        for process in processes:
            process.kill()


# ---------------------------------------------------------------- the runs


def align(trees: list[Tree]) -> None:
    """The first stage of the demo; the stages after it are not run."""
    run(trees, "demo", "--output", "demo", until="demo/align/stage.json")
    for tree in trees:
        shutil.rmtree(tree.folder / "demo" / "expert_image", ignore_errors=True)  # begun, but not to the end


def continual(trees: list[Tree]) -> None:
    """Three tasks whose answers differ in style, and a LLaMA of 16,000 parameters."""
    llm = save_tiny_llm(trees[0].folder.parent / "llm")
    for name, (lr, steps) in STRATEGIES.items():
        for tree in trees:
            settings = {
                "stream": {"root": ".", "tasks": [write_task(tree.folder, task, steps) for task in TASKS]},
                "model": {"llm": str(llm), "chat_template": "chatml"},
                "adapters": {"experts": 4, "rank": 2, "alpha": 16},
                "training": {"batch_size": 6, "lr": lr, "log_every": 1, "accelerator": "cpu"},
                "settings": SETTINGS,
                "probes": 2,
            }
            write_yaml(tree.folder / f"{name}.yaml", settings)
        run(
            trees,
            "continual",
            "run",
            "-c",
            f"{name}.yaml",
            "--strategy",
            name,
            "--output",
            f"continual/{name}",
        )


def write_task(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """Files of one task, whose questions name it; returns its entry in the stream's configuration."""
    pairs = [(f"{name}: {word}", TASKS[name](word)) for word in WORDS]
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": answer}] for text, answer in pairs]
    tests = [{"question_id": text, "text": text, "answer": answer} for text, answer in pairs]
    (folder / f"{name}.json").write_text(json.dumps([{"conversations": turn} for turn in turns]))
    (folder / f"{name}.test.json").write_text(json.dumps(tests))
    files = {"train": f"{name}.json", "test": f"{name}.test.json"}
    return {"name": name, **files, "scorer": "verbatim", "steps": steps}


def detection(trees: list[Tree]) -> None:
    """A dense detector of random weights, then the same with experts."""
    run(trees, "data", "scenes", "scenes", "--images", "16", "--test-images", "2", "--size", "64")
    sizes = {"image_size": 64, "d_model": 32, "ffn_dim": 64, "num_heads": 4, "decoder_layers": 2}
    edge = {"num_queries": 12, "learned_queries": False, "csp_blocks": 1, "csp_expansion": 0.5}
    models = {
        "base": {"detector": {"backbone": "test_efficientnet", **sizes, **edge}, "freeze_encoders": False},
        "moe": {"init_from": "detection/base", "moe": {"copies": 2, "slices": 2}},
    }
    for stage, model in models.items():
        settings = {
            "system": "detection",
            "stage": stage,
            "output": f"detection/{stage}",
            "model": {**model, "denoising": {"queries": 12}, "lr": 1.0e-3},
            "data": {
                "train": "scenes/train.json",
                "val": "scenes/val.json",
                "augment": {"sizes": [64], "longest": 64, "flip": 0.5, "crop": 0.0},
                "steps": 10,
                "batch_size": 8,
            },
        }
        for tree in trees:
            write_yaml(tree.folder / f"{stage}.yaml", settings)
        run(trees, "fit", "-c", f"{stage}.yaml")


def write_yaml(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


RUNS = {"align": align, "continual": continual, "detection": detection}


# ---------------------------------------------------------------- the comparison


def read_curve(path: Path) -> Curve:
    """All values of a metrics.csv except speeds; none if the file does not exist."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (int(float(row["step"])), column): float(value)
        for row in rows
        for column, value in row.items()
        if value and column != "step" and not column.endswith("_per_second")
    }


def largest_difference(found: Curve, expected: Curve) -> float:
    """Relative to the expected values; infinite where one curve has a value that the other lacks."""
    if found.keys() != expected.keys():
        return math.inf
    pairs = [(found[key], value) for key, value in expected.items()]
    differing = [(a, b) for a, b in pairs if a != b and not (math.isnan(a) and math.isnan(b))]
    return max((abs(a - b) / abs(b) if b else math.inf for a, b in differing), default=0.0)


def compare(found: Path, expected: Path) -> list[tuple[str, int, float, bool]]:
    """(run, steps, largest relative difference, allowed) of every curve and matrix below ``expected``."""
    rows = []
    for path in sorted(expected.rglob("metrics.csv")):
        name = path.parent.relative_to(expected)
        curves = [read_curve(root / name / "metrics.csv") for root in (found, expected)]
        limit = max((limit for key, limit in TOLERANCE.items() if key in str(name)), default=0.0)
        difference = largest_difference(*curves)
        steps = len({step for step, _ in curves[1]})
        rows.append((str(name).removesuffix("/logs"), steps, difference, difference <= limit))
    for path in sorted(expected.rglob("matrix.json")):
        name = path.relative_to(expected)
        other = found / name
        equal = other.is_file() and json.loads(other.read_text()) == json.loads(path.read_text())
        rows.append((str(name), len(TASKS), 0.0 if equal else math.inf, equal))
    return rows


def describe_matrices(folder: Path) -> Iterator[str]:
    """One line for each accuracy matrix below ``folder``: its rows, in percent."""
    for path in sorted(folder.rglob("matrix.json")):
        scores = json.loads(path.read_text())["scores"]
        rows = [" ".join(f"{score:.0f}" for score in row if score is not None) for row in scores]
        yield f"{path.parent.name}: accuracy on each task after each task: {' | '.join(rows)}"


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of the repository at ``commit``, removed in the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compare the losses of this tree with those of a commit")
    parser.add_argument("commit")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    given = parser.parse_args(args)
    print(f"{'run':<44} {'steps':>5}  equal  largest relative difference", flush=True)
    same = True
    with tempfile.TemporaryDirectory() as temporary, checkout(given.commit, Path(temporary) / "code") as code:
        for name in given.runs:
            root = Path(temporary) / name
            trees = [Tree(ROOT, root / "here"), Tree(code, root / "there")]
            RUNS[name](trees)
            rows = compare(trees[0].folder, trees[1].folder)
            same = same and bool(rows)
            for run_name, steps, difference, allowed in rows:
                equal, note = "no" if difference else "yes", "" if allowed else "  <- not allowed"
                print(f"{run_name:<44} {steps:>5}  {equal:<5}  {difference:.1e}{note}", flush=True)
                same = same and allowed
            for line in describe_matrices(trees[0].folder):
                print(line, flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
