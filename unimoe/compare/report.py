"""``results.json`` and ``report.html`` of a comparison."""

import json
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from unimoe.analysis.plots import against_size, compare_losses, intervals, plot_expert_load
from unimoe.artifacts import versions
from unimoe.files import atomic_write, data_url

from .design import DENSE
from .table import ALL, Cell, difference_cells, number, rows_of

Cells = Mapping[tuple[str, int], Cell]


def write_report(
    output: Path, settings: dict[str, Any], unit: str, cells: Cells, judged: Sequence[str]
) -> dict[str, Any]:
    """Write both files into ``output``; returns the content of ``results.json``.

    Args:
        output: folder.
        settings: of all cells, by dotted key.
        unit: of the losses.
        cells: finished ones by design and seed.
        judged: files whose mean loss decides.
    """
    results = {
        "unit": unit,
        "judged": list(judged),
        "rows": rows_of(cells, judged),
        "settings": settings,
        "versions": versions(),
        "cells": list(cells.values()),
    }
    atomic_write(output / "results.json", json.dumps(results, indent=1) + "\n")
    atomic_write(output / "report.html", render(results))
    return results


def render(results: dict[str, Any]) -> str:
    """The page; everything is inside it."""
    rows, cells = results["rows"], [cell for cell in results["cells"] if not cell["failed"]]
    by_design = {row["design"]: [cell for cell in cells if cell["design"] == row["design"]] for row in rows}
    trained = {name: own for name, own in by_design.items() if own}
    shown = {
        row["design"]: (row["difference"][ALL]["mean"], row["difference"][ALL]["half_width"])
        for row in rows
        if ALL in row["difference"]
    }
    plots = {"curves": _image(compare_losses({name: mean_curve(own) for name, own in trained.items()}))}
    if shown:
        title = f"difference of the loss to {DENSE} ({results['unit']}, 95 % interval); left is better"
        plots["differences"] = _image(intervals(shown, title))
        plots["sizes"] = _image(size_plot(results))
    loads = {}
    for name, own in trained.items():
        load = own[0]["routing"].get("load")  # experts have no order that means across seeds would keep
        if load:
            experts = [str(expert) for expert in range(len(load["all"][0]))]
            plot = plot_expert_load(load, experts, columns=3)
            loads[f"{name}, seed {own[0]['seed']}"] = _image(plot)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "yaml": _yaml}
    template = files("unimoe.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    names = list(dict.fromkeys(name for row in rows for name in row["loss"] if name != ALL))
    return environment.from_string(template).render(
        results=results,
        rows=rows,
        plots=plots,
        loads=loads,
        files=names,
        ALL=ALL,
        difference=difference_cells,
    )


def size_plot(results: dict[str, Any]) -> str:
    """SVG: the difference of each design's loss to dense, against its parameters."""
    sizes = {
        row["design"]: (
            row["total"] / 1e6,
            row["difference"][ALL]["mean"],
            row["difference"][ALL]["half_width"],
        )
        for row in results["rows"]
        if row["total"] and ALL in row["difference"]
    }
    return against_size(sizes, f"difference of the loss to {DENSE} ({results['unit']}, 95 % interval)")


def mean_curve(cells: Sequence[Cell]) -> list[dict[str, float]]:
    """The curve's rows, averaged over cells of one design."""
    found: list[dict[str, float]] = []
    for column in ("train/loss", "val/loss"):
        by_step: dict[float, list[float]] = {}
        for cell in cells:
            for row in cell["curve"]:
                if column in row:
                    by_step.setdefault(row["step"], []).append(row[column])
        found += [
            {"step": step, column: statistics.fmean(values)} for step, values in sorted(by_step.items())
        ]
    return found


def _image(svg: str) -> str:
    return data_url("image/svg+xml", svg.encode())


def _yaml(settings: Any) -> str:
    return yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=110)
