import sys

import pytest

from unimoe.data import read_samples
from unimoe.data.read import data_files, stream_samples
from unimoe.errors import UserError
from unimoe.media.source import describe, media_bytes

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def rows():
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    said = [{"type": "text", "text": "A cat."}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return [
        {"messages": turns, "images": [{"bytes": f"picture {row}".encode(), "path": "a.png"}], "n": row}
        for row in range(150)
    ]


def contents(samples):
    return [media_bytes(next(sample.media()), "x").decode() for sample in samples]


EXPECTED = [f"picture {row}" for row in range(150)]


def test_parquet_samples_hold_places_and_streamed_ones_content(tmp_path):
    path = tmp_path / "set.parquet"
    datasets.Dataset.from_list(rows()).to_parquet(path)
    samples = read_samples(path)
    assert [sample.source for sample in samples] == [f"{path}[{row}]" for row in range(150)]
    part = next(samples[70].media())
    assert "bytes" not in part and describe(part) == f"images.0.bytes in {path}[70]"
    assert contents(samples) == EXPECTED
    streamed = list(stream_samples(path, convert=False))
    assert [sample.messages[1:] for sample in streamed] == [sample.messages[1:] for sample in samples]
    assert contents(streamed) == EXPECTED and "bytes" in next(streamed[0].media())


def test_a_name_with_brackets(tmp_path):
    path = tmp_path / "set [1].parquet"
    datasets.Dataset.from_list(rows()).to_parquet(path)
    assert contents(read_samples(path)) == EXPECTED


def test_a_saved_data_set(tmp_path):
    saved = datasets.Dataset.from_list(rows()).cast_column("images", datasets.List(datasets.Image()))
    saved.select(range(149, -1, -1)).save_to_disk(tmp_path / "set", num_shards=3)
    assert [file.suffix for file in data_files(tmp_path / "set")] == [".arrow"] * 3
    samples = read_samples(tmp_path / "set")
    assert contents(samples) == EXPECTED[::-1]
    assert contents(stream_samples(tmp_path / "set", convert=False)) == EXPECTED[::-1]


def test_a_dictionary_of_splits_asks_for_one(tmp_path):
    split = datasets.Dataset.from_list(rows())
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="holds the splits train, test; name one of them"):
        read_samples(tmp_path / "set")
    assert len(read_samples(tmp_path / "set" / "train")) == 150


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_table_cut_in_the_middle(tmp_path, ending):
    whole = tmp_path / "set.parquet"
    if ending == "parquet":
        datasets.Dataset.from_list(rows()).to_parquet(whole)
    else:
        datasets.Dataset.from_list(rows()).save_to_disk(tmp_path / "set")
        (whole,) = data_files(tmp_path / "set")
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(whole.read_bytes()[:3000])
    for convert in (True, False):
        with pytest.raises(UserError, match=rf"cut\.{ending}: cannot be read as a table: "):
            list(stream_samples(cut, convert=convert))


def test_faults_name_the_row(tmp_path):
    broken = rows()[:3]
    broken[1]["images"] = []
    datasets.Dataset.from_list(broken).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(UserError, match=r"set\.parquet\[1\]: found 1 <image> placeholders and 0 images"):
        read_samples(tmp_path / "set.parquet")


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'unimoe\[data\]'"):
        read_samples(tmp_path / "a.parquet")
