import json
from pathlib import Path

import pytest

from unimoe.data import read_samples, write_samples
from unimoe.errors import UserError
from unimoe.training.curve import read_curve


def losses(folder):
    return [
        row["train/loss"] for row in read_curve(Path(folder, "logs", "metrics.csv")) if "train/loss" in row
    ]


def test_a_stage_trains_on_parquet_and_shards_as_on_json(align, fit, world, tmp_path):
    parquet, shard = tmp_path / "train.parquet", tmp_path / "train-0.tar"
    samples = read_samples(world / "train.jsonl")
    write_samples(parquet, samples)
    write_samples(shard, samples)
    curves = []
    for file, more in (
        (world / "train.jsonl", {}),
        (parquet, {}),
        (tmp_path / "train-{0..0}.tar", {}),
        (shard, {"pack": 100}),
    ):
        align["data"] |= {"train": str(file), **more}
        align["output"] = str(tmp_path / f"run{len(curves)}")
        fit(align)
        curves.append(losses(align["output"]))
    assert curves[0] == curves[1] == curves[2] == pytest.approx(curves[3], abs=1e-5)
    assert list(json.loads(Path(align["output"], "stage.json").read_text())["data"]) == [str(shard)]


def test_a_stage_streams_mixes_and_drops(align, fit, world, caplog):
    write_samples(world / "train.tar", read_samples(world / "train.jsonl"))
    shares = {str(world / "train.tar"): 0.5, str(world / "train.jsonl"): 1.5}
    align["data"] |= {"train": shares, "stream": True, "buffer": 4, "max_length": 35, "overflow": "drop"}
    fit(align)
    assert len(losses(align["output"])) == 3
    assert "more than max_length 35; it is dropped" in caplog.text
    align["data"]["too_long"] = align["data"].pop("overflow")  # as version 0.1 named it
    caplog.set_level("INFO")
    fit(align)
    assert "is finished: align, 3 steps" in caplog.text
    with pytest.raises(UserError, match="does not go with cache_features"):
        fit(align, "--data.cache_features", "true", "--overwrite", "true")
