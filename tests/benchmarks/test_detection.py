import importlib.util
import json
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "detection.py"
TINY = {"d_model": 32, "num_heads": 4, "ffn_dim": 32, "decoder_layers": 1, "num_queries": 8, "csp_blocks": 1}


def test_decoders_and_a_whole_model_are_measured(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_detection", FILE)
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "PAPER", TINY)
    monkeypatch.setattr(bench, "TOKENS", 6)
    small = bench.small_text()
    monkeypatch.setattr(bench, "BertConfig", lambda **sizes: small)
    whole = bench.whole_model
    monkeypatch.setattr(bench, "whole_model", lambda name, rounds: whole(name, rounds, 64, (2, 3, 4)))
    file = tmp_path / "latency.json"
    bench.main(["--backbones", "test_efficientnet", "--queries", "8", "--rounds", "2", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["decoder"]["ratio"] > 0
    assert set(found["models"]["test_efficientnet"]) == {
        "with text",
        "text cached",
        "backbone",
        "text encoder",
        "enhancer and decoder",
    }
    assert "decoder, 8 queries" in capsys.readouterr().out
