import importlib.util
import json
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "experts.py"


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_experts", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPES", {name: module.Shape(16, 24, 4, 2) for name in ("S1", "L1")})
    monkeypatch.setattr(module, "RANK", 2)
    return module


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one-hot"])
def test_every_operation_is_measured_and_written(bench, routing, tmp_path, capsys):
    file = tmp_path / "rows.json"
    bench.main(
        [
            "--shapes",
            "S1",
            "--tokens",
            "1",
            "64",
            "--routings",
            routing,
            "--seconds",
            "0",
            "--json",
            str(file),
        ]
    )
    rows = json.loads(file.read_text())
    columns = ["op", "shape", "T", "dtype", "routing", "phase", "impl"]
    columns += ["median_ms", "ratio_to_floor", "saved_bytes"]
    assert all(list(row) == columns for row in rows)
    assert {row["op"] for row in rows} == {"experts", "moe_layer", "lora_experts", "adapted_linear"}
    for phase in bench.PHASES:
        names = {row["impl"] for row in rows if row["op"] == "experts" and row["phase"] == phase}
        assert names >= {"floor", "unimoe", "transformers eager", "transformers grouped_mm"}
    ours = [row for row in rows if row["impl"] == "unimoe" and row["op"] == "experts" and row["T"] == 64]
    assert all(128 * 2 * 24 * 4 <= row["saved_bytes"] <= 128 * (2 * 24 * 4 + 40) for row in ours)
    assert "experts S1 T=64" in capsys.readouterr().out


def test_no_time_is_taken_of_implementations_that_disagree(bench, monkeypatch):
    case = bench.experts(bench.SHAPES["S1"], 8, "uniform", "cpu", bench.torch.float32)
    case.runs["wrong"] = lambda: case.runs["unimoe"]() * 1.01
    with pytest.raises(SystemExit, match="wrong differs from unimoe"):
        bench.check(case)
