"""``unimoe demo applications``: the small systems on embedded data, each beside its dense control.

Every cell (variant, seed) is a run of ``unimoe fit`` and ``unimoe test`` in a folder of its own; the same
command resumes, and more seeds are added to what is there.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from unimoe.analysis.seeds import over_seeds
from unimoe.artifacts import read_record
from unimoe.commands.fit import main as lightning
from unimoe.compare.statistics import paired_difference
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.prepare import prepare
from unimoe.prepare.cache import cache_folder, fault
from unimoe.prepare.parts import find_part

from . import console
from .steps import Step, never, run_steps, shipped

DEFAULT_OUTPUT = "runs/applications"


@dataclass(frozen=True)
class Application:
    """What is compared."""

    purpose: str
    variants: dict[str, list[str]]
    """Name -> flags of ``unimoe fit``; the first is the registered one, the last the dense control."""
    score: str
    """The registered statistic, a key of scores.json."""
    higher: bool
    """Whether more of it is better."""
    rivals: list[str]
    """The variants that the others are compared with, beside the dense control; the first is registered."""
    beside: list[str] = field(default_factory=list)
    """Other keys of scores.json to report: a number, or one for each layer."""
    parts: list[str] = field(default_factory=list)
    """Parts of ``unimoe prepare``."""
    minutes: float = 1.0
    """Minutes of a cell, on one idle core."""
    base: str | None = None
    """The variant that is trained first and that the others start from (``--model.adapt_from``)."""


ADAPTATION = ["--data.steps", "300", "--model.lr", "5.0e-4"]
"""Settings of the adaptation of a trained model that answers and draws."""
APPLICATIONS = {
    "recommendation": Application(
        purpose="Six tasks on MovieLens: HoME beside PLE, MMoE and a shared bottom, of equal parameters.",
        variants={
            "home": ["--model.network.kind", "home"],
            "ple": ["--model.network.kind", "ple"],
            "mmoe_norm": ["--model.network.kind", "mmoe", "--model.network.norm", "true"],
            "mmoe": ["--model.network.kind", "mmoe"],
            "shared_bottom": ["--model.network.kind", "shared_bottom"],
        },
        score="mean_auc",
        higher=True,
        rivals=["mmoe", "mmoe_norm"],
        parts=["movielens"],
        minutes=0.6,
    ),
    "diffusion": Application(
        purpose="Emoji of two artists: ProMoE beside Switch-DiT and a dense model of equal active size.",
        variants={
            "promoe": ["--model.dit.design", "promoe"],
            "switch_dit": ["--model.dit.design", "switch_dit"],
            "dense": ["--model.dit.design", "dense"],
        },
        score="loss",
        higher=False,
        rivals=["switch_dit"],
        beside=["probe_accuracy", "class_expert_information", "live_experts"],
        parts=["sprites", "artist", "image"],
        minutes=20.0,
    ),
    "restoration": Application(
        purpose="Photos in rain, haze and snow: MoFME beside FFN experts and a dense model of equal active "
        "size.",
        variants={
            "mofme": ["--model.restorer.design", "mofme"],
            "mofme_top_k": ["--model.restorer.design", "mofme_top_k"],
            "ffn_moe": ["--model.restorer.design", "ffn_moe"],
            "dense": ["--model.restorer.design", "dense"],
        },
        score="psnr",
        higher=True,
        rivals=["ffn_moe", "mofme_top_k"],
        beside=[
            *("psnr_rain", "psnr_haze", "psnr_snow", "input_psnr", "ssim", "input_ssim"),
            *("weather_expert_information", "live_experts"),
        ],
        parts=["photos"],
        minutes=3.5,
    ),
    "saliency": Application(
        purpose="Sets of salient objects: PSOD's task experts beside a router and a dense model.",
        variants={
            "psod": ["--model.network.design", "psod"],
            "switch": ["--model.network.design", "switch"],
            "dense": ["--model.network.design", "dense"],
        },
        score="f1",
        higher=True,
        rivals=["dense", "switch"],
        beside=["quality_correlation", "precision", "recall", "mae", "f_beta", "preference_of_best"],
        parts=["sprites", "photos"],
        minutes=4.0,
    ),
    "unified": Application(
        purpose="Answers and drawings by one model: its drawing FFNs as experts, pruned, or dense.",
        variants={
            "moe": ["--model.unified.design", "moe", *ADAPTATION],
            "frozen": ["--model.unified.design", "moe", "--model.frozen", "1.0", *ADAPTATION],
            "pruned": ["--model.unified.design", "pruned", *ADAPTATION],
            "base": [],
            "dense": ["--model.unified.design", "dense", *ADAPTATION],
        },
        score="loss",
        higher=False,
        rivals=["pruned", "frozen"],
        beside=["accuracy", "accuracy_yes_no", "recognised"],
        parts=["sprites", "artist"],
        minutes=4.0,
        base="base",
    ),
    "adaptation": Application(
        purpose="Emoji of an unseen artist, each in turn by the seed: Meta-DMoE's unlabeled step, beside the "
        "same parts trained without it and a dense model of equal active size.",
        variants={
            "meta": ["--model.network.design", "meta"],
            "plain": ["--model.network.design", "plain"],
            "dense": ["--model.network.design", "dense"],
        },
        score="accuracy",
        higher=True,
        rivals=["plain"],
        beside=["accuracy_before", "gain", "accuracy_of_knowledge"],
        parts=["sprites", "artist", "noto", "fluent"],
        minutes=2.0,
    ),
}


@dataclass(frozen=True)
class ApplicationsDemo:
    """One run of one application."""

    folder: Path
    name: str
    seeds: int

    @property
    def application(self) -> Application:
        return APPLICATIONS[self.name]

    def cell(self, variant: str, seed: int) -> Path:
        return self.folder / f"{variant}-{seed}"

    def scores(self, variant: str) -> dict[int, dict[str, Any]]:
        """Seed -> scores of the test, of the cells that are finished."""
        paths = {seed: self.cell(variant, seed) / "logs/test/scores.json" for seed in range(self.seeds)}
        return {
            seed: json.loads(path.read_text(encoding="utf-8"))
            for seed, path in paths.items()
            if path.is_file()
        }


def applications(name: str = "recommendation", /, output: str = DEFAULT_OUTPUT, seeds: int = 5):
    """Train an application with its rivals and its dense control, and compare them over seeds.

    The same command resumes an interrupted run; with more seeds it adds to what is there. Writes report.json.

    Args:
        name: which application, such as recommendation.
        output: folder of the results, one folder in it for each application.
        seeds: number of seeds, from 0.

    Raises:
        UserError: there is no such application, or ``seeds`` is below 1.
    """
    if name not in APPLICATIONS:
        raise UserError(f"no application is called {name!r}, expected one of {', '.join(APPLICATIONS)}")
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}, expected at least 1")
    run = ApplicationsDemo(Path(output) / name, name, seeds)
    run_steps(run, plan(run), run.application.purpose)
    console.say(f"\nThe report: {run.folder / 'report.json'}")


def plan(run: ApplicationsDemo) -> list[Step]:
    """Every step: seed after seed, so that an interrupted run can be compared too."""
    steps = [Step("prepare", "download and convert the data, once", 0.5, _prepare, _prepared)]
    for seed in range(run.seeds):
        for variant in sorted(run.application.variants, key=lambda one: one != run.application.base):
            act, done = partial(_fit, variant, seed), partial(_done, variant, seed)
            steps.append(
                Step(f"{variant}-{seed}", f"{variant}, seed {seed}", run.application.minutes, act, done)
            )
    return [*steps, Step("report", "the comparison", 0.1, report, never)]


def _prepare(run: ApplicationsDemo) -> None:
    prepare(run.application.parts)


def _prepared(run: ApplicationsDemo) -> bool:
    return all(fault(find_part(name), cache_folder()) is None for name in run.application.parts)


def _fit(variant: str, seed: int, run: ApplicationsDemo) -> None:
    common = ["-c", str(shipped(f"applications/{run.name}")), "--output", str(run.cell(variant, seed))]
    common += ["--seed_everything", str(seed), *run.application.variants[variant]]
    if run.application.base not in (None, variant):
        common += ["--model.adapt_from", str(run.cell(str(run.application.base), seed))]
    for verb in ("fit", "test"):
        lightning([verb, *common])


def _done(variant: str, seed: int, run: ApplicationsDemo) -> bool:
    cell = run.cell(variant, seed)
    return read_record(cell) is not None and (cell / "logs/test/scores.json").is_file()


def report(run: ApplicationsDemo) -> dict[str, Any]:
    """Write report.json and print the tables: means over seeds, and differences paired by seed."""
    application, key = run.application, run.application.score
    scores = {variant: run.scores(variant) for variant in application.variants}
    values = {
        variant: {seed: one[key] for seed, one in by_seed.items()} for variant, by_seed in scores.items()
    }
    others = list(dict.fromkeys([*application.rivals, list(application.variants)[-1]]))
    found: dict[str, Any] = {"application": run.name, "statistic": key, "higher": application.higher}
    found |= {"rival": application.rivals[0], "variants": {}}
    console.say(f"\n  {key} by variant ({'higher' if application.higher else 'lower'} is better)")
    for variant, by_seed in values.items():
        summary = over_seeds(list(by_seed.values()))
        beside = {
            name: {seed: one[name] for seed, one in scores[variant].items() if name in one}
            for name in application.beside
        }
        row: dict[str, Any] = {"seeds": by_seed, **summary, "beside": beside}
        console.say(f"  {variant:<16}{_shown(summary)}")
        for name, one in beside.items():
            if one:
                console.say(f"    {name} {_shown(over_seeds([_layer_mean(v) for v in one.values()]))}")
        for other in others:
            if other != variant:
                row[f"to {other}"] = _difference(by_seed, values[other], application.higher)
        found["variants"][variant] = row
    console.say("\n  differences, paired by seed")
    for variant, row in found["variants"].items():
        for other in others:
            if other != variant:
                console.say(f"  {_line(f'{variant} - {other}', row[f'to {other}'])}")
    atomic_write(run.folder / "report.json", json.dumps(found, indent=1) + "\n")
    return found


def _difference(own: dict[int, float], other: dict[int, float], higher: bool) -> dict[str, Any]:
    """Difference of a statistic, own minus other; ``higher``: whether more of it is better."""
    sign = -1 if higher else 1  # the comparison is of losses
    losses, baseline = ({seed: sign * one for seed, one in by_seed.items()} for by_seed in (own, other))
    difference = paired_difference(losses, baseline)
    assert difference is not None
    return {
        "mean": sign * difference.mean,
        "half_width": difference.half_width,
        "seeds": difference.seeds,
        "better_in": sum(losses[seed] < baseline[seed] for seed in losses.keys() & baseline.keys()),
        "verdict": difference.verdict,
    }


def _line(name: str, row: dict[str, Any]) -> str:
    half = "" if row["half_width"] is None else f" ± {row['half_width']:.4f}"
    better = f"better in {row['better_in']} of {row['seeds']}"
    return f"{name:<28}{row['mean']:+.4f}{half:<12}{better}  {row['verdict'] or ''}".rstrip()


def _shown(found: dict[str, float | None]) -> str:
    return f"{found['mean']:.4f}" + ("" if found["std"] is None else f" ± {found['std']:.4f}")


def _layer_mean(value: float | list[float]) -> float:
    return fmean(value) if isinstance(value, list) else value
