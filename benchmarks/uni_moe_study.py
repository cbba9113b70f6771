"""``make bench ARGS="uni_moe_study"``: ablations of Uni-MoE's design choices, over several seeds.

Every row starts from the demo's aligned model (the data and the stage ``align`` of ``unimoe demo``) and
trains in two phases by the demo's recipe with fewer steps and smaller batches. All rows see the same number
of samples:

phase 1  specialised: one copy of the language model trains on images, another on speech, half of the steps
         each; copies, dense: one model trains on the same samples of both
phase 2  specialised: the FFNs of those two models and two of the base become the experts of an MoE model;
         copies: four copies of phase 1's FFNs do; dense: phase 1's model continues. Then all train on
         everything.

All MoE models initialise their routers from samples of each expert (stages/router_start.py). Phase 1 trains
only the layers that become MoE layers in phase 2. Top-1 routing weighs by the probability over all experts:
the softmax of a single kept logit is 1 and gives the router no gradient. ``images only`` and ``speech only``
are the dense model on one modality.

Scores are exact-match accuracy and the mean loss of the reference answers, which also separates models with
equal answers. The scale is small: 135 M parameters, a few hundred samples, a few dozen questions per set.
Each cell is a file in ``--output``; the same command resumes an interrupted study.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoConfig

from unimoe.data import Collator, FeatureCache, Sample
from unimoe.demo.evaluate import Question, ask, perplexity, read_questions
from unimoe.demo.steps import note_settings, shipped
from unimoe.errors import UserError
from unimoe.files import atomic_write, file_hash
from unimoe.model.host_loss import answer_loss
from unimoe.model.loading import load_model
from unimoe.moe import MoEConfig
from unimoe.stages.assemble import assemble
from unimoe.stages.cli import main as stages_cli
from unimoe.synthetic.clips import ASSETS

MIXES = {
    "images": {"image": 8, "questions": 2, "positions": 2},
    "speech": {"transcribe": 4, "spoken": 8},
    "both": {"image": 4, "questions": 1, "positions": 1, "transcribe": 2, "spoken": 4},
    "all": {"image": 4, "questions": 1, "positions": 1, "spoken": 4, "transcribe": 1, "text": 1},
}
"""Samples of each training file in a batch of 12; ``both`` is the union of the two specialists' data."""
SETS = {
    "images": "test.new_backgrounds",
    "written": "test.text_questions",
    "spoken": "test.spoken_questions",
    "speech": "val.transcribe",
}
"""Test sets: naming images, questions about images (written and spoken), and transcribing speech."""
EXPERTS = {
    "text": ["text"],
    "image": ["image", "questions", "positions"],
    "speech": ["spoken", "transcribe"],
    "text2": ["text"],
}
"""Expert to the training files its router row is initialised from."""


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    start: Literal["specialised", "copies", "dense"]
    placement: str = "interval"
    top_k: int = 2
    balance: float = 0.0
    data: str = "all"


CELLS = {
    "specialised": Cell("specialised"),
    "copies": Cell("copies"),
    "dense": Cell("dense"),
    "specialised, balance": Cell("specialised", balance=0.01),
    "copies, balance": Cell("copies", balance=0.01),
    "specialised, top-1": Cell("specialised", top_k=1),
    "copies, top-1": Cell("copies", top_k=1),
    "all layers": Cell("specialised", placement="all"),
    "first half": Cell("specialised", placement="first_half"),
    "second half": Cell("specialised", placement="second_half"),
    "images only": Cell("dense", data="images"),
    "speech only": Cell("dense", data="speech"),
}


class Study:
    """The rows of one seed. Rows share the phase 1 models they have in common."""

    def __init__(self, demo: Path, folder: Path, seed: int, steps: tuple[int, int], questions: int):
        self.demo, self.seed, self.steps, self.questions = demo, seed, steps, questions
        self.work = folder / f"seed-{seed}"
        self.layers = AutoConfig.from_pretrained(demo / "align").get_text_config().num_hidden_layers

    def run(self, cell: Cell) -> dict[str, Any]:
        """Train and score one row; its phase 2 models are deleted."""
        began = time.process_time()
        phase2 = self.work / "phase2"
        shutil.rmtree(phase2, ignore_errors=True)
        start = self.dense(cell) if cell.start == "dense" else self.moe(cell, phase2)
        recipe = self.recipe("moe", start, phase2 / "trained", cell.data, self.steps[1])
        if cell.start == "dense":
            recipe["model"]["trainable"] = [{"match": self.connectors(cell.data), "lr": 1.0e-5}]
            for entry in recipe["model"]["lora"]:
                if entry["layers"] == "experts":
                    entry |= {"layers": "ffn", "match": self.placed(cell.placement)}
        found = self.score(self.fit(recipe))
        shutil.rmtree(phase2)
        return {**found, "cpu_seconds": round(time.process_time() - began, 1)}

    # ---------------------------------------------------------------- phase 1

    def dense(self, cell: Cell) -> Path:
        """One model trained on the specialists' data, or on one modality."""
        data = "both" if cell.data == "all" else cell.data
        return self.phase1("dense", data, cell.placement, 2 * self.steps[0])

    def specialist(self, modality: str, placement: str) -> Path:
        """A model trained on one modality."""
        return self.phase1("expert", modality, placement, self.steps[0])

    def phase1(self, result: str, data: str, placement: str, steps: int) -> Path:
        """The folder of a phase 1 model; ``result`` is ``dense`` or ``expert``."""
        output = self.work / f"{result}-{data}-{placement}"
        recipe = self.recipe("expert_image", self.demo / "align", output, data, steps)
        recipe["model"] |= {"save": "expert" if result == "expert" else "model", "task": data}
        recipe["model"]["trainable"][0]["match"] = self.connectors(data)
        recipe["model"]["lora"][0]["match"] = self.placed(placement)
        return self.fit(recipe)

    def placed(self, placement: Any) -> list[str]:
        """Name patterns of the layers that become MoE layers."""
        return [f"*layers.{layer}.mlp.*" for layer in MoEConfig(placement=placement).layers(self.layers)]

    def connectors(self, data: str) -> str:
        """Name pattern of the connectors that ``data`` trains."""
        modality = {"images": "image.", "speech": "speech."}.get(data, "")
        return f"model.connectors.{modality}*"

    # ---------------------------------------------------------------- phase 2

    def moe(self, cell: Cell, folder: Path) -> Path:
        """An assembled MoE model, before phase 2 training."""
        sources = dict.fromkeys(EXPERTS, "base")
        manifest = yaml.safe_load(shipped("uni_moe/assemble").read_text(encoding="utf-8"))
        manifest |= {"base": str(self.demo / "align"), "connectors": {}, "output": str(folder / "assembled")}
        if cell.start == "copies":
            manifest["base"] = str(self.dense(cell))
        else:
            experts = {name: str(self.specialist(name, cell.placement)) for name in ("images", "speech")}
            sources |= {"image": experts["images"], "speech": experts["speech"]}
            manifest["connectors"] = {"image": experts["images"], "speech": experts["speech"]}
        manifest["experts"] = [
            {"name": name, "from": sources[name], "data": [self.file(f"train.{file}") for file in files]}
            for name, files in EXPERTS.items()
        ]
        gating = {"gating": "topk_softmax"}
        if cell.top_k == 1:
            gating = {"gating": "softmax_topk", "renormalize": False}
        sizes = {"top_k": cell.top_k, "placement": cell.placement, "balance_coef": cell.balance}
        manifest |= {"moe": {**sizes, **gating}, "routers": {"samples": 100}, "seed": self.seed}
        path = folder / "assemble.yaml"
        atomic_write(path, yaml.safe_dump(manifest))
        stored = folder / "features"  # the routers' samples are already encoded
        stored.unlink(missing_ok=True)
        stored.symlink_to((self.demo / "features").resolve())
        assemble(str(path))
        return folder / "assembled"

    # ---------------------------------------------------------------- both

    def file(self, name: str) -> str:
        return str(self.demo / "data" / f"{name}.jsonl")

    def recipe(self, name: str, start: Path, output: Path, data: str, steps: int) -> dict[str, Any]:
        """Settings of one of the demo's stages, on ``steps`` batches of ``data``."""
        settings = yaml.safe_load(shipped(f"uni_moe/{name}").read_text(encoding="utf-8"))
        settings |= {"output": str(output), "checkpoint_every": steps}
        settings["model"]["init_from"] = str(start)
        settings["data"] = {
            "train": {self.file(f"train.{kind}"): count for kind, count in MIXES[data].items()},
            "steps": steps,
            "cache_features": str(self.demo / "features"),
        }
        return settings

    def fit(self, recipe: dict[str, Any]) -> Path:
        """Run a stage unless it is finished; returns its folder."""
        output = Path(recipe["output"])
        path = output.with_name(f"{output.name}.yaml")
        atomic_write(path, yaml.safe_dump(recipe, sort_keys=False))
        stages_cli(["fit", "-c", str(path), "--seed_everything", str(self.seed)])
        return output

    def score(self, folder: Path) -> dict[str, Any]:
        """Accuracy and loss on each test set, the same for every row and seed, and perplexity on prose."""
        model, processor = load_model(folder)
        features = FeatureCache(self.demo / "features", processor, dict(model.model.encoders))  # type: ignore[arg-type]
        collator = Collator(processor, features=features)
        found: dict[str, Any] = {}
        for name, file in SETS.items():
            every = read_questions(self.file(file))
            chosen = random.Random(0).sample(every, min(self.questions, len(every)))
            answered = [whole(question) for question in chosen]
            features.fill(answered)
            answers = ask(model, processor, chosen, features)
            correct = [question.is_right(answer) for question, answer in zip(chosen, answers, strict=True)]
            with torch.no_grad():
                loss = answer_loss(model, collator.bucket_by_length(answered))[0].item()
            found[name] = {"accuracy": statistics.fmean(correct), "loss": loss, "count": len(correct)}
        prose = (ASSETS / "prose.txt").read_text(encoding="utf-8")[:4000]
        return {"sets": found, "perplexity": perplexity(model, processor, prose)}


def whole(question: Question) -> Sample:
    """The conversation with its reference answer."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
    return Sample([*question.sample.messages, answer], question.sample.source)


def summary(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the table: mean and standard deviation over the finished seeds."""
    heads = "".join(f"{name:>14}" for name in (*SETS, "mean", "loss", "perplexity"))
    lines = [f"{'':<22}{'seeds':>6}{heads}"]
    for name in dict.fromkeys(run["cell"] for run in runs):
        rows = [figures(run) for run in runs if run["cell"] == name]
        columns = [spread([row[column] for row in rows]) for column in range(len(rows[0]))]
        lines.append(f"{name:<22}{len(rows):>6}" + "".join(f"{column:>14}" for column in columns))
    return lines


def figures(run: dict[str, Any]) -> list[float]:
    """A row's accuracies in percent, their mean, the mean loss and the perplexity."""
    accuracies = [100 * run["sets"][name]["accuracy"] for name in SETS]
    loss = statistics.fmean(run["sets"][name]["loss"] for name in SETS)
    return [*accuracies, statistics.fmean(accuracies), loss, run["perplexity"]]


def spread(values: Sequence[float]) -> str:
    """``mean ± standard deviation``, or the mean of a single value."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="ablations of Uni-MoE's design choices")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of the demo's run")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL")
    parser.add_argument(
        "--expert-steps",
        type=int,
        default=20,
        help="phase 1 steps of a specialist; twice that for others",
    )
    parser.add_argument("--steps", type=int, default=16, help="phase 2 steps")
    parser.add_argument("--questions", type=int, default=40, help="questions per test set")
    parser.add_argument("--keep", action="store_true", help="keep the phase 1 models of a finished seed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if not (options.demo / "align" / "config.json").is_file():
        raise UserError(f"{options.demo}/align does not exist; run `unimoe demo` up to that stage first")
    sizes = {"expert_steps": options.expert_steps, "steps": options.steps, "questions": options.questions}
    note_settings(options.output, {**sizes, "align": file_hash(options.demo / "align" / "model.safetensors")})
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        steps = (options.expert_steps, options.steps)
        study = Study(options.demo, options.output, seed, steps, options.questions)
        for name in options.cells:
            path = options.output / "cells" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
            if not path.is_file():
                found = {"cell": name, "seed": seed, **asdict(CELLS[name]), **study.run(CELLS[name])}
                atomic_write(path, json.dumps(found, indent=1) + "\n")
            runs.append(json.loads(path.read_text(encoding="utf-8")))
            shown = "  ".join(f"{value:.2f}" for value in figures(runs[-1]))
            print(f"seed {seed}  {name:<22}{shown}   {runs[-1]['cpu_seconds']} CPU s", flush=True)
        if not options.keep:
            shutil.rmtree(study.work, ignore_errors=True)
        print("\n".join(["", *summary(runs), ""]), flush=True)
    found = {"settings": sizes, "runs": runs}
    atomic_write(options.output / "study.json", json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"unimoe: error: {error}")
