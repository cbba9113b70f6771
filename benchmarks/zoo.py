"""``make bench ARGS="zoo --only NAME"``: registered experiments on the claims of published MoE designs.

    make bench ARGS="zoo --list"
    make bench ARGS="zoo --only evomoe"
    make bench ARGS="zoo --table"

Each file ``benchmarks/zoo/NAME.yaml`` states, before the run: the design, the claim of its paper, a statistic
of one cell, the direction that the claim predicts, the control, seeds and minutes. A run trains the missing
cells of ``unimoe compare`` (equal batches and active parameters), prints what came out, and writes
``benchmarks/zoo/results/NAME.json`` and the table docs/results/zoo.md. The result holds the hash of the
registration: a changed file counts as not run. What was seen afterwards stands in ``results/remarks.yaml``.

Experiments of one setting (``benchmarks/zoo/settings``) share their cells in runs/zoo. The data is the Debian
Administrator's Handbook, see ``handbook.py``; experiments on digits need scikit-learn.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from unimoe.compare.statistics import paired_difference
from unimoe.errors import UserError
from unimoe.files import atomic_write, file_hash

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "zoo"
PAGE = ROOT / "docs" / "results" / "zoo.md"
TEXT = Path("runs/text")
BASE = Path("runs/zoo/base")
"""A dense model of bytes, which upcycled designs start from; the first experiment that needs it trains it."""
ON_DIGITS = ("cdsp", "uoe")
"""Experiments that do not read ``TEXT``."""
FEWEST_SEEDS = 5
NOT_RUN = "registered, not run yet"
STATISTICS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "loss": lambda cell: fmean(cell["losses"].values()),
    "start": lambda cell: fmean(cell["start"].values()),
    "first_max_over_mean": lambda cell: len(first := cell["routing"]["load"]["all"][0]) * max(first),
    **{
        name: lambda cell, name=name: cell["routing"][name]
        for name in ("max_over_mean", "dead", "entropy", "information")
    },
}
"""Name -> statistic of a cell of ``unimoe compare``: mean held-out loss after and before training; load of
the fullest expert over the mean in the first MoE layer; routing as of ``RoutingMeasures.summary``."""


@dataclass(frozen=True)
class Experiment:
    """One registration."""

    name: str
    """Name of the file."""
    design: str
    """Name that the paper gives the design."""
    claim: str
    """Claim of the paper, with its source."""
    statistic: str
    """A name of ``STATISTICS``; in words for a script."""
    direction: str
    """``lower`` or ``higher``: where the claim puts the design relative to the control."""
    treatment: Any
    """Entry of ``designs`` of ``unimoe compare``, a name for a script."""
    control: Any
    """Entry of ``designs`` of ``unimoe compare``, a name for a script."""
    minutes: float
    """Estimate for all cells on one free core."""
    setting: str = ""
    """File of ``benchmarks/zoo/settings``: the comparison without designs, seeds and output."""
    script: str = ""
    """Script, in place of ``setting``, for what is no MoE layer of an LLM: a file of this folder with
    ``run(seed) -> {"treatment": {"value": ..., "active": ..., "seconds": ...}, "control": {...}}``;
    ``active`` are the parameters that were measured."""
    size: str = ""
    """Size of a script's experiment, in words."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    note: str = ""
    """What a reader of the result must know."""

    def __post_init__(self) -> None:
        if self.direction not in ("lower", "higher"):
            raise UserError(f"{self.name}: direction is {self.direction!r}, expected lower or higher")
        if len(set(self.seeds)) < FEWEST_SEEDS:
            raise UserError(f"{self.name}: seeds is {self.seeds}, expected at least {FEWEST_SEEDS}")
        if bool(self.setting) == bool(self.script):
            raise UserError(f"{self.name}: give one of setting and script")
        if self.setting and self.statistic not in STATISTICS:
            raise UserError(f"{self.name}: statistic is {self.statistic!r}, expected {', '.join(STATISTICS)}")

    @property
    def sides(self) -> dict[str, str]:
        """``treatment`` and ``control`` -> name of the design."""
        sides = {"treatment": self.treatment, "control": self.control}
        return {
            side: one if isinstance(one, str) else one.get("name") or one["preset"]
            for side, one in sides.items()
        }

    @property
    def where(self) -> str:
        """The size of the experiment: first comment of the setting."""
        if self.script:
            return self.size
        lines = (FOLDER / "settings" / f"{self.setting}.yaml").read_text(encoding="utf-8").splitlines()
        return lines[0].lstrip("# ")

    @property
    def hash(self) -> str:
        """Hash of everything that was fixed before the run."""
        shared = (
            FOLDER / "settings" / f"{self.setting}.yaml" if self.setting else FOLDER / f"{self.script}.py"
        )
        parts = [FOLDER / f"{self.name}.yaml", shared]
        return "-".join(file_hash(part)[:16] for part in parts)


def read_experiments() -> dict[str, Experiment]:
    """All registrations by name.

    Raises:
        UserError: a file has an unknown key, lacks one, or its values do not fit.
    """
    found = {}
    known = [one.name for one in fields(Experiment)]
    for path in sorted(FOLDER.glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key in values:
            if key not in known:
                raise UserError(f"{path.name}: unknown key {key!r}, expected {', '.join(known)}")
        try:
            values["seeds"] = tuple(values.get("seeds", range(FEWEST_SEEDS)))
            found[path.stem] = Experiment(path.stem, **values)
        except TypeError as error:
            raise UserError(f"{path.name}: {error}") from error
    return found


def result_of(experiment: Experiment) -> dict[str, Any] | None:
    """The stored result; None where there is none of this registration."""
    path = FOLDER / "results" / f"{experiment.name}.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found["registration"] == experiment.hash else None


def judge(
    experiment: Experiment, values: Mapping[str, Mapping[int, float]]
) -> tuple[str, dict[str, Any] | None]:
    """``confirmed``, ``contrary`` or ``cannot tell``, and the difference treatment - control paired by seed.

    The claim is confirmed where the whole 95 % interval lies on the side that it predicts.
    """
    found = paired_difference(values["treatment"], values["control"])
    if found is None or found.verdict is None or found.seeds < len(experiment.seeds):
        return "cannot tell", found and asdict(found)
    if found.verdict == "cannot tell":
        return "cannot tell", asdict(found)
    lower = found.verdict == "better"
    return "confirmed" if lower == (experiment.direction == "lower") else "contrary", asdict(found)


def run(experiment: Experiment, output: Path) -> dict[str, Any]:
    """Train what is missing, and store and return the result.

    Raises:
        UserError: there is no text to train on.
    """
    if experiment.name not in ON_DIGITS and not TEXT.is_dir():
        raise UserError(f"{experiment.name} trains on {TEXT}; benchmarks/handbook.py says how to make it")
    measured = _script_cells(experiment) if experiment.script else _compare_cells(experiment, output)
    values = {
        side: {seed: cell["value"] for seed, cell in own.items() if cell["value"] is not None}
        for side, own in measured.items()
    }
    outcome, difference = judge(experiment, values)
    cells = [cell for own in measured.values() for cell in own.values()]
    result = {
        "registration": experiment.hash,
        "outcome": outcome,
        "difference": difference,
        "values": values,
        "active": {
            side: fmean([cell["active"] for cell in own.values() if cell["active"]] or [0])
            for side, own in measured.items()
        },
        "minutes": round(sum(cell["seconds"] for cell in cells) / 60, 1),
    }
    result = json.loads(json.dumps(result))  # keys as a reader of the file finds them
    path = FOLDER / "results" / f"{experiment.name}.json"
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, json.dumps(result, indent=1) + "\n")
    return result


def _compare_cells(experiment: Experiment, output: Path) -> dict[str, dict[int, dict[str, Any]]]:
    from unimoe.compare.config import read_config  # torch: not for --list and --table
    from unimoe.compare.run import compare, read_cells

    folder = output / experiment.setting
    setting = str(FOLDER / "settings" / f"{experiment.setting}.yaml")
    base = yaml.safe_load(Path(setting).read_text(encoding="utf-8")).get("base")
    if base == str(BASE) and not BASE.is_dir():
        _script("tiny_lm").save_base(BASE)
    designs, seeds = [experiment.treatment, experiment.control], list(experiment.seeds)
    compare(read_config(setting, designs=designs, seeds=seeds, output=str(folder)), print)
    cells, found = read_cells(folder), {}
    for side, name in experiment.sides.items():
        found[side] = {
            seed: {
                "value": None if cell["failed"] else STATISTICS[experiment.statistic](cell),
                "active": None if cell["failed"] else cell["cost"]["active"],
                "seconds": cell["seconds"],
            }
            for seed in seeds
            if (cell := cells[name, seed])
        }
    return found


def _script_cells(experiment: Experiment) -> dict[str, dict[int, dict[str, Any]]]:
    try:
        module = _script(experiment.script)
    except ModuleNotFoundError as error:
        raise UserError(f"{experiment.name} needs {error.name}; install it first") from error
    found: dict[str, dict[int, dict[str, Any]]] = {"treatment": {}, "control": {}}
    for seed in experiment.seeds:
        for side, cell in module.run(seed).items():
            found[side][seed] = {"active": None, "seconds": 0.0, **cell}
            print(f"{experiment.name}, {side}, seed {seed}: {cell['value']:.4f}")
    return found


def _script(name: str) -> Any:
    """A file of the experiments' folder as a module."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))  # where scripts find what they share
    return importlib.import_module(name)


def describe(experiment: Experiment, result: Mapping[str, Any] | None) -> str:
    """What came out, in one line."""
    if result is None:
        return NOT_RUN
    sides, found = experiment.sides, result["difference"]
    means = {
        side: f"{fmean(own.values()):.4f}" if own else "no value" for side, own in result["values"].items()
    }
    text = (
        f"{result['outcome']}: {sides['treatment']} {means['treatment']}, {sides['control']} "
        f"{means['control']}"
    )
    if found and found["half_width"] is not None:
        text += f", difference {found['mean']:+.4f} ± {found['half_width']:.4f} ({found['seeds']} seeds)"
    active = result["active"]
    if active["treatment"] and active["control"]:
        text += f"; active parameters {active['treatment'] / 1e6:.3f} M and {active['control'] / 1e6:.3f} M"
    return text


def table() -> str:
    """docs/results/zoo.md."""
    lines = [
        '<!-- Written by `make bench ARGS="zoo --table"`; do not edit. -->',
        "",
        "# Claims of published MoE designs",
        "",
        "One experiment of each design, registered in `benchmarks/zoo/` before its run: statistic, direction,"
        " control, seeds and minutes. A claim is confirmed where the 95 % t-interval of the difference paired"
        " by seed lies on the side that it predicts, contrary where it lies on the other. These models are"
        " far smaller than the papers', so a row says what happens at this size, and no more. Active"
        " parameters are measured on held-out data and include the layers that all designs share.",
        "",
        "| design | claim of its paper | test | here | size | minutes |",
        "|---|---|---|---|---|---|",
    ]
    path = FOLDER / "results" / "remarks.yaml"
    remarks = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for one in read_experiments().values():
        result, sides = result_of(one), one.sides
        test = f"`{one.statistic}` of `{sides['treatment']}` {one.direction} than of `{sides['control']}`"
        minutes = f"{result['minutes']:g}" if result else f"about {one.minutes:g}"
        seen = f"After the run: {remarks[one.name]}" if result and one.name in remarks else ""
        cells = (
            f"{one.design} (`{one.name}`)",
            one.claim,
            test,
            f"{describe(one, result)}. {one.note} {seen}",
            one.where,
            minutes,
        )
        lines.append(f"| {' | '.join(' '.join(cell.split()) for cell in cells)} |")
    lines += [
        "",
        "Minutes of a finished experiment are the time of its cells on a machine shared with other work;"
        " those of the others are estimates for one free core."
        ' `make bench ARGS="zoo --only NAME"` runs one, and resumes.',
        "",
        "Statistics: `loss` is the mean held-out loss in bits per byte, `first_max_over_mean` the load of the"
        " fullest expert over the mean in the first MoE layer, `information` the mutual information of a"
        " token's language and its experts in nats, `start` the loss before training.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="experiments to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the registered experiments")
    parser.add_argument("--table", action="store_true", help="write docs/results/zoo.md from what was run")
    parser.add_argument("--output", type=Path, default=Path("runs/zoo"), help="folder of the cells")
    options = parser.parse_args(arguments)
    experiments = read_experiments()
    names = options.only or list(experiments)
    if unknown := [name for name in names if name not in experiments]:
        raise UserError(f"no experiment {unknown[0]!r}, expected {', '.join(experiments)}")
    for name in names:
        one = experiments[name]
        if options.list:
            state = (result_of(one) or {"outcome": NOT_RUN})["outcome"]
            print(f"{name:<16} {one.design:<24} {one.minutes:>4g} min  {state}")
        elif not options.table:
            print(f"{one.design}: {one.claim}")
            print(f"{name}: {describe(one, run(one, options.output))}")
    if not options.list:
        atomic_write(PAGE, table())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"unimoe: error: {error}")
