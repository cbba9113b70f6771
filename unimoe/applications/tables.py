"""CSV files as coded columns: for each row the number of its value among the distinct ones.

Files of millions of rows stay small this way, and every value is parsed once.
"""

import csv
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unimoe.errors import UserError


@dataclass(frozen=True)
class Column:
    """One column of R rows."""

    name: str
    codes: np.ndarray
    """[R] int32: place of each row's value in ``values``."""
    values: list[str]
    """The distinct values, in order of appearance."""
    where: str
    """The file, for messages."""

    def numbers(self, missing: bool = False) -> np.ndarray:
        """[R] float64; with ``missing`` an empty value is NaN. Raises UserError where one is no number."""
        parsed = np.empty(len(self.values))
        for place, value in enumerate(self.values):
            try:
                parsed[place] = float(value) if value or not missing else np.nan
            except ValueError as error:
                line = int(np.argmax(self.codes == place)) + 2
                raise UserError(
                    f"{self.where}: column {self.name} is {value!r} in row {line}, expected a number"
                ) from error
        return parsed[self.codes]


def read_columns(files: Sequence[str | Path], names: Sequence[str]) -> dict[str, Column]:
    """The columns called ``names`` of CSV files with the same header, one file after another.

    Raises:
        UserError: a file is missing or empty, lacks a column, or a row has another number of cells.
    """
    codes: dict[str, array] = {name: array("i") for name in names}
    seen: dict[str, dict[str, int]] = {name: {} for name in names}
    for path in map(Path, files):
        try:
            with path.open(encoding="utf-8", newline="") as file:
                _read(path, csv.reader(file), codes, seen)
        except FileNotFoundError as error:
            raise UserError(f"there is no data file {path}") from error
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if names and not codes[names[0]]:
        raise UserError(f"{where}: there are no rows")
    return {
        name: Column(name, np.frombuffer(codes[name], dtype=np.int32), list(seen[name]), where)
        for name in names
    }


def _read(path: Path, reader, codes: dict[str, array], seen: dict[str, dict[str, int]]) -> None:
    header = next(reader, None)
    if header is None:
        raise UserError(f"{path} is empty, expected a header and rows")
    header = [name.strip().removeprefix("\ufeff") for name in header]
    if missing := [name for name in codes if name not in header]:
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(header)}")
    wanted = [(header.index(name), codes[name], seen[name]) for name in codes]
    for row in reader:
        if len(row) != len(header):
            if not row:
                continue
            raise UserError(f"{path}, line {reader.line_num}: found {len(row)} cells, expected {len(header)}")
        for place, column, known in wanted:
            column.append(known.setdefault(row[place], len(known)))


def join(column: Column, table: dict[str, Column], key: str) -> dict[str, Column]:
    """Columns of another file brought to the rows of ``column`` by its value in that file's ``key`` column.

    What the file does not list gets an empty value.
    """
    line = {table[key].values[code]: row for row, code in enumerate(table[key].codes.tolist())}
    row_V = np.array([line.get(value, -1) for value in column.values])
    joined = {}
    for name, other in table.items():
        if name != key:
            values = [*other.values, ""]
            code_V = np.where(row_V >= 0, other.codes[row_V], len(other.values)).astype(np.int32)
            joined[name] = Column(name, code_V[column.codes], values, other.where)
    return joined
