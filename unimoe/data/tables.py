"""Parquet and Arrow files, read through the ``datasets`` library: a row is a record.

    row -> {"messages": [...], "images": [{"bytes": b"..."}]} -> {..., "images": [{"stored": TableCell}]}

Arrow files are memory-mapped; a Parquet file is converted once, into that library's cache
(``HF_DATASETS_CACHE``), or streamed. Media are never decoded here.
"""

import glob
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from unimoe.errors import UserError

SUFFIXES = (".parquet", ".arrow")
_ROWS = 64  # read at a time

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class TableCell:
    """Binary content of a Parquet or Arrow file."""

    path: str
    """The file."""
    row: int
    """Number of the row, from 0."""
    keys: tuple[str | int, ...]
    """The column, and the path into its lists and structures."""

    def read(self) -> bytes:
        value = open_table(self.path)[self.row : self.row + 1].to_pylist()[0]
        for key in self.keys:
            value = value[key]
        return value

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.keys))} in {self.path}[{self.row}]"


def table_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (``file[row]``, record) for each row, with a :class:`TableCell` in place of each binary value."""
    table = open_table(str(path))
    for start in range(0, len(table), _ROWS):
        for row, record in enumerate(table[start : start + _ROWS].to_pylist(), start):

            def place(content: bytes, keys: Keys, row: int = row) -> dict[str, Any]:
                return {"stored": TableCell(str(path), row, keys)}

            yield f"{path}[{row}]", _clean(record, place)


def stream_table(path: Path) -> Iterator[tuple[str, Any]]:
    """Read as :func:`table_records` does, without a conversion: records hold their binary values."""
    if not _is_parquet(path):
        yield from table_records(path)
        return
    parquet = require("pyarrow.parquet")
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS):
                for record in batch.to_pylist():
                    yield f"{path}[{row}]", _clean(record, lambda content, keys: {"bytes": content})
                    row += 1
    except (OSError, ValueError) as error:  # pyarrow's errors are of these types
        raise _unreadable(path, error) from error


@lru_cache(maxsize=32)
def open_table(path: str) -> Any:
    """The file as a ``datasets.Dataset`` whose slices are Arrow tables.

    Raises:
        UserError: it cannot be read.
    """
    datasets = require("datasets")
    if not sys.stderr.isatty():
        datasets.utils.disable_progress_bars()
    try:
        if _is_parquet(Path(path)):
            table = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train")
        else:
            table = datasets.Dataset.from_file(path)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(path, error) from error
    return table.with_format("arrow")


def _clean(value: Any, place: Callable[[bytes, Keys], dict[str, Any]], keys: Keys = ()) -> Any:
    """``value`` without entries that are None (Arrow fills absent keys), and with ``place`` of binary
    content."""
    if isinstance(value, bytes):
        return place(value, keys)
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):  # an Image, Audio or Video of the datasets library
            return place(value["bytes"], (*keys, "bytes"))
        return {key: _clean(item, place, (*keys, key)) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_clean(item, place, (*keys, number)) for number, item in enumerate(value)]
    return value


def require(module: str) -> Any:
    """Import a module of the extra ``data``.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"parquet and arrow files need the package {error.name}; pip install 'unimoe[data]'"
        ) from error


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1" or path.suffix == ".parquet"


def _unreadable(path: Path | str, error: Exception) -> UserError:
    reason = " ".join(str(error.__cause__ or error).split())
    return UserError(f"{path}: cannot be read as a table: {reason}")
