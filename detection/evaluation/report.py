"""Scores of detections as tables, as JSON and as curves."""

import json as json_format
from pathlib import Path

import matplotlib.figure
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unimoe.files import atomic_write

from .average_precision import Evaluation, Style

_RECALL = np.linspace(0, 1, 101)


def write_report(
    evaluation: Evaluation, style: Style, json: str | Path | None = None, plots: str | Path | None = None
) -> None:
    """Write all numbers to the file ``json``, the curves into the folder ``plots``, and print the tables."""
    if json:
        atomic_write(json, json_format.dumps({"style": style, **evaluation.to_json()}, indent=1) + "\n")
    drawn = plot_evaluation(evaluation, plots) if plots else []
    console = Console()
    console.print(class_table(evaluation))
    console.print(metric_table(evaluation))
    for file in drawn:
        console.print(Text(f"wrote {file}"))


def class_table(evaluation: Evaluation) -> Table:
    """Classes by AP, those without objects last. Brackets in a name are text, not markup."""
    table = Table("class", "AP", "AP50", "objects", "detections")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in sorted(evaluation.classes, key=lambda row: -row.ap):
        table.add_row(
            Text(row.name), _format(row.ap), _format(row.ap50), str(row.objects), str(row.detections)
        )
    return table


def metric_table(evaluation: Evaluation) -> Table:
    """One metric a row."""
    table = Table("metric", "value")
    for name, value in evaluation.metrics.items():
        table.add_row(name, _format(value))
    return table


def plot_evaluation(evaluation: Evaluation, folder: str | Path) -> list[Path]:
    """Write ``precision_recall.png`` (mean over classes, by IoU) and ``classes.png`` (AP of each class)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves = matplotlib.figure.Figure(figsize=(5, 4), layout="constrained")
    axes = curves.subplots()
    for iou, precision_RC in evaluation.precision_RC.items():
        measured = precision_RC[:, precision_RC[0] > -1]
        if measured.size:
            axes.plot(_RECALL, measured.mean(axis=1), label=f"IoU {iou.replace('mean', '0.50-0.95')}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    rows = sorted((row for row in evaluation.classes if row.objects), key=lambda row: row.ap)
    bars = matplotlib.figure.Figure(figsize=(6, 1 + 0.2 * len(rows)), layout="constrained")
    axes = bars.subplots()
    axes.barh(range(len(rows)), [row.ap for row in rows])
    axes.set_yticks(range(len(rows)), [row.name for row in rows], parse_math=False)
    axes.set(xlabel="AP", xlim=(0, 1), ylim=(-0.5, max(len(rows), 1) - 0.5))
    files = [folder / "precision_recall.png", folder / "classes.png"]
    for figure, file in zip((curves, bars), files, strict=True):
        figure.savefig(file, dpi=100)
    return files


def _format(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"
