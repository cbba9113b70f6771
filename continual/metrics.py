"""Metrics of a continual run: one accuracy matrix, and every published number as a function of it.

Shapes: T tasks; scores_TT[t, j] is the accuracy, in percent, on task j after training task t.

Two divisors of "backward transfer" are in use and differ by T / (T - 1): see ``bwt`` and ``bwt_coin``.
"""

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimoe.errors import UserError
from unimoe.files import atomic_write

METRICS = ("MFN", "MAA", "BWT", "BWT_CoIN", "MFT", "forgetting", "FWT")
"""Keys of :meth:`AccuracyMatrix.summary`, in the order of tables."""


@dataclass
class AccuracyMatrix:
    """a[t][j] of one run; NaN if not measured, in which case the metrics that need it are None.

    A method that trains on all tasks at once (the joint bound) has only the last row.
    """

    tasks: list[str]
    """Names in the order of training."""
    scores_TT: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    """Percent, filled row by row during training. Entries above the diagonal (j > t) are measured only for
    forward transfer."""
    untrained_T: np.ndarray | None = None
    """Percent before the first task, for forward transfer."""

    def __post_init__(self) -> None:
        T = len(self.tasks)
        if len(set(self.tasks)) != T:
            raise UserError(f"the accuracy matrix names a task twice: {', '.join(self.tasks)}")
        if not self.scores_TT.size:
            self.scores_TT = np.full((T, T), np.nan)
        self.scores_TT = np.asarray(self.scores_TT, dtype=float)
        if self.scores_TT.shape != (T, T):
            raise UserError(
                f"the accuracy matrix of {T} tasks has shape {self.scores_TT.shape}, expected {(T, T)}"
            )

    # ---------------------------------------------------------------- metrics

    def mft(self) -> float | None:
        """Mean accuracy on each task right after training it: (1/T) sum_j a[j][j]. Plasticity."""
        return _mean(np.diagonal(self.scores_TT))

    def mfn(self) -> float | None:
        """Mean final accuracy: (1/T) sum_j a[T][j]; "Last" or "ACC" elsewhere."""
        return _mean(self.scores_TT[-1])

    def maa(self) -> float | None:
        """Mean average accuracy: (1/T) sum_t (1/t) sum_{j<=t} a[t][j]; "Avg" in UCIT's tables."""
        rows = [_mean(self.scores_TT[t, : t + 1]) for t in range(len(self.tasks))]
        return _mean(np.array([math.nan if row is None else row for row in rows]))

    def bwt(self) -> float | None:
        """Backward transfer over the T - 1 tasks that can be forgotten (Lopez-Paz and Ranzato, GEM; so the
        tables of MLLM-CL and MCITlib): 1/(T-1) sum_{j<T} (a[T][j] - a[j][j])."""
        return _mean((self.scores_TT[-1] - np.diagonal(self.scores_TT))[:-1])

    def bwt_coin(self) -> float | None:
        """The same sum over T, as in the tables of CoIN (whose formula says T - 1): MFN - MFT."""
        return _mean(self.scores_TT[-1] - np.diagonal(self.scores_TT))

    def forgetting(self) -> float | None:
        """Chaudhry et al.: 1/(T-1) sum_{j<T} (max_{j<=l<T} a[l][j] - a[T][j]); -BWT if the diagonal is the
        maximum of its column."""
        best = [self.scores_TT[j:-1, j].max() for j in range(len(self.tasks) - 1)]
        return _mean(np.array(best) - self.scores_TT[-1, :-1])

    def fwt(self) -> float | None:
        """Forward transfer: 1/(T-1) sum_{j>=2} (a[j-1][j] - b_j) with b_j of the untrained model."""
        if self.untrained_T is None:
            return None
        return _mean(np.diagonal(self.scores_TT, offset=1) - self.untrained_T[1:])

    def summary(self) -> dict[str, float | None]:
        """Every metric by its name in reports."""
        values = (self.mfn, self.maa, self.bwt, self.bwt_coin, self.mft, self.forgetting, self.fwt)
        return {name: value() for name, value in zip(METRICS, values, strict=True)}

    # ---------------------------------------------------------------- files

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, with null for what was not measured."""
        untrained = None if self.untrained_T is None else _plain(self.untrained_T)
        return {
            "tasks": self.tasks,
            "scores": [_plain(row) for row in self.scores_TT],
            "untrained": untrained,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AccuracyMatrix":
        untrained = data.get("untrained")
        return cls(
            list(data["tasks"]),
            np.array(data["scores"], dtype=float),
            None if untrained is None else np.array(untrained, dtype=float),
        )

    def to_csv(self) -> str:
        """A header of tasks and one row per trained task; cells that were not measured are empty."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["trained", *self.tasks])
        for name, row in zip(self.tasks, self.scores_TT, strict=True):
            writer.writerow([name, *("" if math.isnan(score) else f"{score:.4f}" for score in row)])
        return buffer.getvalue()

    def save(self, folder: str | Path) -> None:
        """Write ``matrix.json`` and ``matrix.csv`` into ``folder``."""
        atomic_write(Path(folder) / "matrix.json", json.dumps(self.to_dict(), indent=1) + "\n")
        atomic_write(Path(folder) / "matrix.csv", self.to_csv())


def _mean(values: np.ndarray) -> float | None:
    """None if a value was not measured, or if there is nothing to average (one task has no transfer)."""
    return None if not values.size or np.isnan(values).any() else float(values.mean())


def _plain(row_T: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else round(float(value), 6) for value in row_T]
