"""``unimoe demo applications``: the small systems on embedded data, each beside its dense control.

Every cell (variant, seed) is a run of ``unimoe fit`` and ``unimoe test`` in a folder of its own; the same
command resumes, and more seeds are added to what is there.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

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
    rival: str
    """The variant that the registered statistic is compared with."""
    parts: list[str] = field(default_factory=list)
    """Of ``unimoe prepare``."""
    minutes: float = 1.0
    """Of a cell, on one idle core."""


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
        rival="mmoe",
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
        rival="switch_dit",
        parts=["sprites", "artist", "image"],
        minutes=20.0,
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
        for variant in run.application.variants:
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
    for verb in ("fit", "test"):
        lightning([verb, *common])


def _done(variant: str, seed: int, run: ApplicationsDemo) -> bool:
    cell = run.cell(variant, seed)
    return read_record(cell) is not None and (cell / "logs/test/scores.json").is_file()


def report(run: ApplicationsDemo) -> dict[str, Any]:
    """Write report.json and print the table: means over seeds, and differences paired by seed."""
    application = run.application
    key, sign = application.score, -1 if application.higher else 1  # the comparison is of losses
    values = {
        variant: {seed: one[key] for seed, one in run.scores(variant).items()}
        for variant in application.variants
    }
    dense = list(application.variants)[-1]
    found: dict[str, Any] = {"application": run.name, "statistic": key, "rival": application.rival}
    found["variants"] = {}
    console.say(f"\n  {'':<16}{key:>20}{'to ' + application.rival:>22}{'to ' + dense:>24}")
    for variant, by_seed in values.items():
        mean, spread = fmean(by_seed.values()), stdev(by_seed.values()) if len(by_seed) > 1 else 0.0
        row: dict[str, Any] = {"seeds": by_seed, "mean": mean, "sd": spread}
        line = f"  {variant:<16}{f'{mean:.4f} ± {spread:.4f}':>20}"
        for other in (application.rival, dense):
            if variant == other:
                line += " " * 24
                continue
            losses = [{seed: sign * one for seed, one in values[v].items()} for v in (variant, other)]
            difference = paired_difference(losses[0], losses[1])
            assert difference is not None
            gain, half = sign * difference.mean, difference.half_width
            row[f"to {other}"] = {
                "mean": gain,
                "half_width": half,
                "better_in": sum(losses[0][seed] < losses[1][seed] for seed in losses[0]),
                "verdict": difference.verdict,
            }
            line += f"{gain:>+12.4f} {'' if half is None else f'± {half:.4f}':<10} "
        console.say(f"{line} {row.get(f'to {application.rival}', {}).get('verdict') or ''}")
        found["variants"][variant] = row
    atomic_write(run.folder / "report.json", json.dumps(found, indent=1) + "\n")
    return found
