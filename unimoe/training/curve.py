"""The training log as one CSV file that a resumed run continues."""

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.logger import Logger

from unimoe.files import atomic_write


class CurveLogger(Logger):
    """Appends each logged row to ``metrics.csv``.

    Lightning's own CSVLogger deletes the file of an earlier run. This one keeps it: ``cut(step)`` drops the
    rows that a resumed run will write again, so that the file holds every step once.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        return "curve"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def cut(self, step: int):
        """Keep the rows of the steps before ``step`` (0-based, as Lightning counts)."""
        rows = [row for row in read_curve(self.path) if row["step"] < step]
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        self._rewrite(rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None):
        row = {"step": step, **metrics}
        new = [key for key in row if key not in self.columns]
        if new:  # the header grows, as when the first validation adds its columns
            rows = read_curve(self.path)
            self.columns += new
            self._rewrite([*rows, row])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any):
        """Does nothing: settings are in stage.json."""

    def _rewrite(self, rows: list[dict[str, Any]]):
        for row in rows:
            row["step"] = int(row["step"])
        lines = [self.columns, *([row.get(key, "") for key in self.columns] for row in rows)]
        text = "\n".join(",".join(map(str, line)) for line in lines) if self.columns else ""
        atomic_write(self.path, text + "\n" if text else "")


def read_curve(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a ``metrics.csv`` as numbers, without empty cells and an incomplete last line."""
    path = Path(path)
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                numbers = {key: float(value) for key, value in row.items() if value}
            except (TypeError, ValueError):  # a line cut short by a kill
                continue
            if "step" in numbers:
                rows.append(numbers)
    return rows
