"""Rows of feedback from CSV files: MovieLens as prepared, KuaiRand as published, or others.

Shapes: R rows, B of a batch, T tasks, L entries of a list.
"""

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from unimoe.applications.tables import Column, join, read_columns
from unimoe.errors import UserError
from unimoe.prepare import default_part
from unimoe.training.application import ApplicationData

FeatureKind = Literal["id", "list", "number"]
BUCKETS = 16
"""Buckets of a number: quantiles of the training rows."""
LONGEST = 16
"""Entries of a list that are read."""
COMPARISONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ">=": np.greater_equal,
    "<=": np.less_equal,
    "==": np.equal,
    ">": np.greater,
    "<": np.less,
}
MOVIELENS_FEATURES: dict[str, FeatureKind] = {
    "userId": "id",
    "movieId": "id",
    "genres": "list",
    "year": "id",
    "timestamp": "number",
}
MOVIELENS_TASKS = {
    "like": {"like": "rating >= 4", "love": "rating >= 4.5", "favourite": "rating >= 5"},
    "dislike": {"dislike": "rating <= 2.5", "hate": "rating <= 1.5", "worst": "rating <= 0.5"},
}


class Batch(NamedTuple):
    """B rows."""

    index: Tensor  # type: ignore[override]  (tuple.index)
    """[B] their numbers in the split."""
    features: list[Tensor]
    """[B] or [B, L] int64 for each feature, 0 for unknown values and empty places."""
    labels: Tensor
    """[B, T] float, 0 or 1."""


@dataclass
class Feature:
    """One feature of R rows: ``numbers[codes]``."""

    codes: np.ndarray
    """[R]."""
    numbers: np.ndarray
    """[values] or [values, L] rows of the embedding table."""
    size: int
    """Rows of that table."""


class Rows:
    """Some rows of a table, fetched a batch at a time."""

    def __init__(self, rows: np.ndarray, features: list[Feature], labels_RT: np.ndarray):
        self.rows, self.features, self.labels_RT = rows, features, labels_RT

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = self.rows[indices]
        features = [torch.from_numpy(one.numbers[one.codes[rows]]) for one in self.features]
        labels = torch.from_numpy(self.labels_RT[rows].astype(np.float32))
        return Batch(torch.tensor(indices), features, labels)


class RecommendationData(ApplicationData):
    """Feedback of users on items, split into rows for training, validation and test."""

    def __init__(
        self,
        train: str | list[str] = "movielens",
        tables: dict[str, str] | None = None,
        features: dict[str, FeatureKind] | None = None,
        tasks: dict[str, dict[str, str]] | None = None,
        order: str | None = None,
        val_share: float = 0.05,
        test_share: float = 0.15,
        steps: int = 320,
        batch_size: int = 512,
        seed: int = 0,
    ):
        """
        Args:
            train: CSV files with a header, all splits in one; or ``movielens``, the prepared part.
            tables: column -> CSV file of facts about its values (users, items), with the same column.
            features: column -> ``id``, ``list`` (values between ``|`` or commas) or ``number`` (in 16
                quantiles); MovieLens has its own.
            tasks: group -> task -> condition on a column, such as ``rating >= 4`` or ``is_click``.
            order: column by whose numbers rows are sorted before the last become validation and test
                (default: these are drawn at random, the same for every seed).
            val_share: share of the rows for validation.
            test_share: share of the rows for the test.
            steps: optimizer steps; the data is repeated as often as that takes.
            batch_size: rows of a batch on each device.
            seed: seed of the order of the rows in training.

        Raises:
            UserError: a setting is missing or out of range.
        """
        super().__init__(steps, batch_size, seed)
        movielens = train == "movielens"
        self.paths = [str(default_part("movielens") / "ratings.csv")] if movielens else _listed(train)
        self.tables, self.order = tables or {}, order
        self.features = features or (MOVIELENS_FEATURES if movielens else {})
        self.tasks = tasks or (MOVIELENS_TASKS if movielens else {})
        if not self.features or not any(self.tasks.values()):
            raise UserError("data.features and data.tasks must name columns and conditions of your files")
        for name, kind in self.features.items():
            if kind not in get_args(FeatureKind):
                raise UserError(f"data.features.{name} is {kind!r}, expected id, list or number")
        if min(val_share, test_share) < 0 or val_share + test_share >= 1:
            raise UserError(f"data.val_share and test_share are {val_share} and {test_share}, sum below 1")
        self.shares = {"val": val_share, "test": test_share}
        self.sizes: dict[str, int] = {}
        """Rows of each feature's embedding table, after ``setup``."""

    def files(self) -> list[str]:
        return [*self.paths, *self.tables.values()]

    def describe(self) -> dict[str, Any]:
        """What a network must know about the data."""
        return {"sizes": self.sizes, "tasks": {group: list(tasks) for group, tasks in self.tasks.items()}}

    def setup(self, stage: str) -> None:
        """Read the files and split their rows.

        Raises:
            UserError: a file or a column is bad, a split is empty, or a task has one class in one of them.
        """
        if self.sets:
            return
        columns = self._read()
        names = [name for tasks in self.tasks.values() for name in tasks]
        conditions = [text for tasks in self.tasks.values() for text in tasks.values()]
        labels_RT = np.stack([_holds(text, columns) for text in conditions], axis=1)
        splits = self._split(columns, len(labels_RT))
        for split, rows in splits.items():
            if len(rows) == 0 and (split == "train" or self.shares[split]):
                raise UserError(
                    f"{self.paths[0]}: the {split} split of {len(labels_RT)} rows is empty; "
                    "see data.val_share and data.test_share"
                )
            for task, positive in zip(names, labels_RT[rows].sum(axis=0) if len(rows) else (), strict=False):
                if positive in (0, len(rows)):
                    raise UserError(
                        f"task {task!r}: {int(positive)} of {len(rows)} rows of the {split} split are "
                        "positive, expected both classes; change the condition or the shares"
                    )
        training = splits["train"]
        made = {name: _feature(columns[name], kind, training) for name, kind in self.features.items()}
        self.sizes = {name: one.size for name, one in made.items()}
        self.sets = {
            split: Rows(rows, list(made.values()), labels_RT) for split, rows in splits.items() if len(rows)
        }

    def _read(self) -> dict[str, Column]:
        """Every column that a feature, a task or ``order`` names, whichever file it is in."""
        wanted = dict.fromkeys(self.features)
        wanted |= dict.fromkeys(_parse(text)[0] for tasks in self.tasks.values() for text in tasks.values())
        wanted |= dict.fromkeys([self.order] if self.order else [])
        tabled = {key: _header(path, key) for key, path in self.tables.items()}
        elsewhere = {name for names in tabled.values() for name in names} - self.tables.keys()
        own = [name for name in dict.fromkeys([*wanted, *self.tables]) if name not in elsewhere]
        columns = read_columns(self.paths, own)
        for key, path in self.tables.items():
            found = [name for name in tabled[key] if name in wanted and name not in columns]
            columns |= join(columns[key], read_columns([path], [key, *found]), key)
        return columns

    def _split(self, columns: dict[str, Column], count: int) -> dict[str, np.ndarray]:
        """Row numbers of each split: the last rows by ``order``, or random ones."""
        if self.order is None:
            rows = np.random.default_rng(0).permutation(count)
        else:
            rows = np.argsort(columns[self.order].numbers(), kind="stable")
        test = round(count * self.shares["test"])
        val = round(count * self.shares["val"])
        ends = (count - test - val, count - test)
        return {"train": rows[: ends[0]], "val": rows[ends[0] : ends[1]], "test": rows[ends[1] :]}


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _header(path: str, key: str) -> list[str]:
    """The columns of a CSV file. Raises UserError if it has none called ``key``."""
    read_columns([path], [key])
    with open(path, encoding="utf-8", newline="") as file:
        return [name.strip().removeprefix("\ufeff") for name in next(csv.reader(file))]


def _parse(condition: str) -> tuple[str, str, float]:
    """Column, comparison and number of ``rating >= 4``; a column alone means ``> 0``."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:(>=|<=|==|>|<)\s*(-?\d+(?:\.\d+)?)\s*)?", condition)
    if match is None:
        raise UserError(
            f"data.tasks: {condition!r} is no condition, expected such as `rating >= 4` or `is_click`"
        )
    column, comparison, number = match.groups()
    return column, comparison or ">", float(number or 0)


def _holds(condition: str, columns: dict[str, Column]) -> np.ndarray:
    """[R] bool."""
    name, comparison, number = _parse(condition)
    return COMPARISONS[comparison](columns[name].numbers(), number)


def _feature(column: Column, kind: FeatureKind, training: np.ndarray) -> Feature:
    """Numbers of a column's values; values that no training row has get 0."""
    if kind == "number":
        numbers_R = column.numbers(missing=True)
        known_R = np.isfinite(numbers_R)
        if not known_R[training].any():
            raise UserError(f"{column.where}: column {column.name} is empty in all training rows")
        trained_R = numbers_R[training][known_R[training]]
        edges = np.quantile(trained_R, np.linspace(0, 1, BUCKETS + 1)[1:-1])
        bucket_R = np.where(known_R, np.searchsorted(edges, numbers_R, side="right") + 1, 0)
        return Feature(bucket_R, np.arange(BUCKETS + 1), BUCKETS + 1)
    trained = np.zeros(len(column.values), dtype=bool)
    trained[column.codes[training]] = True
    known: dict[str, int] = {}
    rows: list[list[int]] = []
    for value, use in zip(column.values, trained.tolist(), strict=True):
        entries = [one for one in re.split(r"[|,]", value) if one][:LONGEST] if kind == "list" else [value]
        for entry in entries if use else ():
            known.setdefault(entry, len(known) + 1)
        rows.append([known.get(entry, 0) for entry in entries])
    if kind == "id":
        return Feature(column.codes, np.array([row[0] for row in rows]), len(known) + 1)
    numbers = np.zeros((len(rows), max(1, max(map(len, rows)))), dtype=np.int64)
    for place, row in enumerate(rows):
        numbers[place, : len(row)] = row
    return Feature(column.codes, numbers, len(known) + 1)
