"""The table of ratings is read without pandas, and its pickle runs nothing else."""

import io
import lzma
import os
import pickle
import sys
from types import SimpleNamespace
from zipfile import ZipFile

import numpy as np
import pytest

from unimoe.prepare import movielens


def make(module: str, name: str, monkeypatch):
    """A class that pickles by a call of ``module.name`` with the instance's arguments."""

    class Made:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return Called, self.arguments[:-1], self.arguments[-1]

    class Called:
        pass

    Called.__module__, Called.__qualname__ = module, name
    monkeypatch.setitem(sys.modules, "pandas", sys.modules.get("pandas", SimpleNamespace()))
    known = vars(sys.modules.get(module, SimpleNamespace()))
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{**known, name: Called}))
    return Made


def table(monkeypatch) -> bytes:
    """Two ratings as pandas stores them: a block of numbers, a block of texts, and the names."""
    frame = make("pandas.core.frame", "DataFrame", monkeypatch)
    manager = make("pandas.core.internals.managers", "BlockManager", monkeypatch)
    block = make("pandas._libs.internals", "_unpickle_block", monkeypatch)
    index = make("pandas.core.indexes.base", "_new_Index", monkeypatch)
    numbers = np.array([[7, 8], [31, 32], [1995, np.nan], [2.5, 4], [99, 100]])
    texts = np.array([["Drama|War", "Comedy"], ["a", "b"]], dtype=object)
    names = ["userId", "movieId", "genres", "title", "year", "rating", "timestamp"]
    blocks = (
        block(numbers, np.array([0, 1, 4, 5, 6]), 2, None),
        block(texts, slice(2, 4, 1), 2, None),
    )
    axes = [index(None, {"data": np.array(names, dtype=object)}, None), None]
    return pickle.dumps(frame({"_mgr": manager(blocks, axes, None)}), protocol=5)


def test_a_table_becomes_rows_of_text(tmp_path, monkeypatch):
    content = table(monkeypatch)
    file = tmp_path / "some.whl"
    with ZipFile(file, "w") as wheel:
        wheel.writestr(movielens.PICKLE, lzma.compress(content))
    with ZipFile(file) as wheel:
        movielens.convert(wheel, tmp_path)
    assert (tmp_path / "ratings.csv").read_text().splitlines() == [
        "userId,movieId,year,genres,rating,timestamp",
        "7,31,1995,Drama|War,2.5,99",
        "8,32,,Comedy,4,100",
    ]


class Harmful:
    def __reduce__(self):
        return os.getenv, ("HOME",)


def test_any_other_name_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="os.getenv, which is not allowed"):
        movielens.read_table(pickle.dumps(Harmful()))


def test_nothing_of_pandas_is_imported():
    allowed = movielens._TableUnpickler(io.BytesIO()).allowed
    assert all(not getattr(one, "__module__", "").startswith("pandas") for one in allowed.values())
