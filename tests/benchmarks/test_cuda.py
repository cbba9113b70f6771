import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import yaml

from unimoe.synthetic import multimodal

FILE = Path(__file__).parents[2] / "benchmarks" / "cuda.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_cuda", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def run(bench, tmp_path, *words: str) -> list[dict]:
    """The rows of a run that succeeds."""
    file = tmp_path / "rows.json"
    with pytest.raises(SystemExit) as end:
        bench.main([*words, "--tiny", "--json", str(file)])
    assert end.value.code == 0
    return json.loads(file.read_text())


def test_training_is_measured_beside_the_plan(bench, tmp_path):
    rows = run(bench, tmp_path, "--only", "training")
    assert {row["part"] for row in rows} == {"training"}
    assert [row["precision"] for row in rows] == ["bf16-true", "bf16-mixed"]
    for row in rows:
        assert row["tokens a step"] == 2 * 2 * row["tokens of a sample"]
        assert all(map(math.isfinite, row["loss"]))
        assert row["tokens/s"] > 0 and row["trained"] < row["weights"]
        stored = 2 if row["precision"] == "bf16-true" else 4
        assert row["planned GB"] * 1e9 > stored * (row["weights"] + 3 * row["trained"])
        assert ("found over planned" in row) == ("peak GB" in row) == torch.cuda.is_available()
        assert "share" not in row  # of a peak rate that was not measured


@pytest.mark.slow
def test_a_stage_of_the_demo_is_measured(bench, tmp_path, monkeypatch):
    """One stage; tests/demo/test_whole_demo.py runs all of them."""
    monkeypatch.setattr(bench.load("stages"), "STAGES", ("align",))
    monkeypatch.setattr(multimodal, "TRAINED", multimodal.TRAINED[:4])  # few images
    (row,) = run(bench, tmp_path, "--only", "demo")
    assert (row["part"], row["stage"]) == ("demo", "align")
    assert row["steps/s"] > 0 and row["tokens/s"] > 0 and row["weights"] > 0
    assert all(map(math.isfinite, row["loss"]))


def test_the_larger_demo_keeps_what_the_stages_train(bench, tmp_path):
    stages = bench.load("stages")
    for name in stages.STAGES:
        ours = yaml.safe_load(stages.write_stage(tmp_path, name, False).read_text())
        text = yaml.safe_dump(ours)
        assert "runs/demo" not in text and "default" not in text
        shipped = yaml.safe_load(stages.shipped(f"uni_moe/{name}").read_text())
        for key in ("trainable", "lora", "save"):
            assert ours.get("model", {}).get(key) == shipped.get("model", {}).get(key)
        counts = [[*one.get("data", {}).get("train", {}).values()] for one in (ours, shipped)]
        assert counts[0] == counts[1]


def test_a_part_that_fails_does_not_end_the_others(bench, monkeypatch, capsys):
    def rows(*_):
        yield {"loss": 1.0}
        raise RuntimeError("no such kernel")

    failing = bench.Part("fails", rows, tiny=True)
    works = bench.Part("works", lambda *_: iter([{"loss": 2.0}]), tiny=True)
    monkeypatch.setattr(bench, "PARTS", {"one": failing, "two": works, "large": bench.Part("", works.rows)})
    with pytest.raises(SystemExit) as end:
        bench.main(["--tiny"])
    assert end.value.code == 1
    out = capsys.readouterr().out
    assert "loss 1\n" in out and "FAILED: one: RuntimeError: no such kernel" in out and "loss 2\n" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "found no CUDA device"),
        (["--only", "training"], "found no CUDA device"),
        (["--only", "nothing"], "no part 'nothing', expected peak, correctness"),
        (["--only", "graphs", "--tiny"], "graphs has no tiny size, only training, demo"),
    ],
)
def test_what_cannot_run_is_one_line(bench, monkeypatch, capsys, words, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_parts_are_chosen_with_what_they_need(bench, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.choose(["demo"], False) == ["demo"]
    assert bench.choose(["training", "correctness"], False) == ["peak", "correctness", "training"]
    assert bench.choose([], True) == ["training", "demo"]
    assert bench.choose([], False) == [name for name in bench.PARTS if name != "tune"]
    bench.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(bench.PARTS)
