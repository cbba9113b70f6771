from unimoe.detection.evaluation.latency import decoder_latency, percentiles, time_in_turns
from unimoe.detection.model.moe_tuning import moe_tuning


def test_latency_of_two_decoders(tiny_detector):
    dense, moe = tiny_detector(learned_queries=False), moe_tuning(tiny_detector(), copies=2, slices=2)
    found = decoder_latency(moe, dense, queries=6, text_tokens=4, cells=(4, 2, 1), rounds=3)
    assert found["ratio"] > 0 and found["moe"]["p95_ms"] >= found["moe"]["p50_ms"] > 0
    calls: list[str] = []
    seconds = time_in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 4 and len(seconds["a"]) == 2
    assert percentiles([0.001, 0.002, 0.003]) == {"p50_ms": 2.0, "p95_ms": 3.0}
