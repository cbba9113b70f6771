"""Report on finished runs: metrics over seeds, accuracy matrices, drift, parameters, time."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from unimoe.analysis.seeds import over_seeds
from unimoe.artifacts import differences, flatten
from unimoe.errors import UserError
from unimoe.files import atomic_write

from .metrics import METRICS

Result = dict[str, Any]

CAPTIONS = {
    "matrices": "Accuracy on each task (column) after each task was learned (row), mean over seeds.",
    "drift": "Share of the routing weight of a task's questions on the banks of later tasks, mean over blocks"
    " and seeds; 0 if routing does not change.",
}


def report(runs: list[str], output: str | None = None) -> None:
    """Write report.json, report.html and plots of finished runs.

    Args:
        runs: folders of finished runs that differ only in strategy and seed; the seeds of a strategy are
            averaged.
        output: folder of the report (default: the folder that contains the runs).

    Raises:
        UserError: for a run that is not finished or cannot be compared with the others.
    """
    results = [_read(Path(run), "result.json", "strategy") for run in runs]
    if not results:
        raise UserError("report needs at least one folder of a finished run")
    _compare(runs)
    folder = Path(output) if output else Path(runs[0]).resolve().parent
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["strategy"], []).append(result)
    summary = {
        "tasks": results[0]["tasks"],
        "divisors": {"BWT": "T - 1 (GEM, MLLM-CL, MCITlib)", "BWT_CoIN": "T (CoIN's tables): MFN - MFT"},
        "strategies": {name: _summary(several) for name, several in groups.items()},
    }
    plots = [_plot_matrices(groups, folder)]
    if len(results[0]["tasks"]) > 1 and any(any(result["drift"]) for result in results):
        plots.append(_plot_drift(groups, folder))
    atomic_write(folder / "report.json", json.dumps(summary, indent=1) + "\n")
    atomic_write(folder / "report.html", _page(summary, plots))
    print(table(summary))
    print(f"\nReport: {folder / 'report.html'}")


def table(summary: dict[str, Any]) -> str:
    """A text table of strategies and metrics: mean and standard deviation over seeds, in percent."""
    columns = [name for name in METRICS if name != "FWT"]
    lines = ["strategy     " + "".join(f"{name:>16}" for name in columns)]
    for name, found in summary["strategies"].items():
        lines.append(f"{name:<13}" + "".join(f"{_cell(found[column]):>16}" for column in columns))
    return "\n".join(lines)


def _cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "-"
    return f"{value['mean']:.2f}" + ("" if value["std"] is None else f" ±{value['std']:.2f}")


def _read(folder: Path, name: str, key: str) -> Result:
    path = folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished run: {name} is not there") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, dict) or key not in found:
        raise UserError(f"{path} was not written by a run; it holds no {key!r}")
    return found


def _compare(runs: Sequence[str]) -> None:
    """
    Raises:
        UserError: for runs that differ in more than strategy and seed, or one that is given twice.
    """
    seen: dict[tuple[str, int], str] = {}
    stands: dict[str, tuple[str, dict[str, Any]]] = {}
    for run in runs:
        noted = _read(Path(run), "run.json", "identity")
        strategy, seed = noted["identity"].pop("strategy"), noted["identity"].pop("seed")
        for group, settings in (("", noted), (strategy["name"], strategy)):
            flat = flatten(settings, lists=True)
            other, wanted = stands.setdefault(group, (run, flat))
            for key, values in differences(wanted, flat).items():
                raise UserError(f"{run} cannot be compared with {other}: {key}: {values}")
        if (other := seen.setdefault((strategy["name"], seed), run)) != run or runs.count(run) > 1:
            raise UserError(f"{other} and {run} are both seed {seed} of {strategy['name']}")


def _summary(results: Sequence[Result]) -> dict[str, Any]:
    """Metrics over the seeds of one strategy."""
    values = {name: over_seeds([result["metrics"][name] for result in results]) for name in METRICS}
    known = {name: over_seeds([result["known"][name] for result in results]) for name in ("MFN", "BWT")}
    return {
        **values,
        "known": known,
        "format_drift": _format_drift(values, known),
        "seeds": [result["seed"] for result in results],
        "matrices": [result["matrix"]["scores"] for result in results],
        "known_matrices": [result["known_matrix"]["scores"] for result in results],
        "drift": [result["drift"] for result in results],
        "parameters": results[0]["parameters"],
        "seconds": {
            part: float(np.mean([sum(result["seconds"][part]) for result in results]))
            for part in ("train", "evaluate")
        },
    }


def _format_drift(values: dict[str, Any], known: dict[str, Any]) -> float | None:
    """BWT of the lenient grades less that of the strict ones: points lost in form alone."""
    strict, lenient = values["BWT"]["mean"], known["BWT"]["mean"]
    return None if strict is None or lenient is None else lenient - strict


# -------------------------------------------------------------------- plots


def _plot_matrices(groups: dict[str, list[Result]], folder: Path) -> Path:
    """The accuracy matrix of each strategy, mean over seeds."""
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    tasks = next(iter(groups.values()))[0]["tasks"]
    size = 1.2 + 0.42 * len(tasks)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, size * rows), squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.axis("off")
    for axis, (name, results) in zip(axes.flat, groups.items(), strict=False):
        scores_TT = np.mean([np.array(result["matrix"]["scores"], dtype=float) for result in results], axis=0)
        axis.imshow(scores_TT, vmin=0, vmax=100, cmap="viridis")
        for (t, j), score in np.ndenumerate(scores_TT):
            if not np.isnan(score):
                colour = "black" if score > 60 else "white"
                axis.text(j, t, f"{score:.0f}", ha="center", va="center", color=colour, fontsize=7)
        axis.set_title(name)
        axis.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(tasks)), tasks, fontsize=7)
        axis.set_xlabel("accuracy on")
        axis.set_ylabel("after")
    return _save(figure, folder / "matrices.png")


def _plot_drift(groups: dict[str, list[Result]], folder: Path) -> Path:
    """Share of routing mass of each task's questions on banks of later tasks, mean over blocks and seeds."""
    routed = {name: results for name, results in groups.items() if any(results[0]["drift"])}
    figure, axes = plt.subplots(1, len(routed), figsize=(4 * len(routed), 3), squeeze=False, sharey=True)
    for axis, (name, results) in zip(axes.flat, routed.items(), strict=True):
        tasks = results[0]["tasks"]
        for j, task in enumerate(tasks[:-1]):
            means = [
                np.mean([np.mean(result["drift"][t][task]) for result in results])
                for t in range(j, len(tasks))
            ]
            axis.plot(range(j + 1, len(tasks) + 1), means, marker=".", label=task)
        axis.set_title(name)
        axis.set_xlabel("tasks learned")
        axis.set_ylim(0, 1)
    axes[0, 0].set_ylabel("mass on later banks")
    axes[0, -1].legend(fontsize=6)
    return _save(figure, folder / "drift.png")


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _page(summary: dict[str, Any], plots: Sequence[Path]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in METRICS)
    rows = ""
    for name, found in summary["strategies"].items():
        cells = "".join(f"<td>{_cell(found[metric])}</td>" for metric in METRICS)
        drift = "-" if found["format_drift"] is None else f"{found['format_drift']:.2f}"
        extra = f"{found['parameters']['added']:,}", f"{found['seconds']['train']:.0f}"
        cells += f"<td>{drift}</td>" + "".join(f"<td>{value}</td>" for value in extra)
        rows += f"<tr><th>{html.escape(name)}</th>{cells}</tr>"
    images = "".join(
        f'<figure><img src="{figure.name}" alt="{figure.stem}"><figcaption>{CAPTIONS[figure.stem]}'
        "</figcaption></figure>"
        for figure in plots
    )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>continual learning</title>
<style>body {{ font: 15px sans-serif; margin: 2em }} td, th {{ padding: .3em .8em; text-align: right }}
figure {{ margin: 2em 0 }} img {{ max-width: 100% }}</style>
<h1>Continual learning</h1>
<p>Tasks in order: {html.escape(", ".join(summary["tasks"]))}. Percent, mean ± standard deviation over seeds.
BWT divides by T - 1, BWT_CoIN by T. "Form": points of BWT that are lost in form alone, while the right answer
is still contained in another form (negative: form was regained). "Seconds": training time.</p>
<table><tr><th>strategy</th>{heads}<th>form</th><th>weights added</th><th>seconds</th></tr>{rows}</table>
{images}</html>
"""
