from types import SimpleNamespace

from unimoe.serve.metrics import Metrics


def test_gauges_show_the_engine_as_it_is_now():
    engine = SimpleNamespace(running=2, waiting=5)
    metrics = Metrics(engine)
    assert b"unimoe_answers_running 2.0" in metrics.page()
    engine.running, engine.waiting = 0, 1
    page = metrics.page()
    assert b"unimoe_answers_running 0.0" in page and b"unimoe_answers_waiting 1.0" in page
    assert b"process_resident_memory_bytes" in page


def test_two_servers_in_one_process_count_apart():
    first, second = (Metrics(SimpleNamespace(running=0, waiting=0)) for _ in range(2))
    first.answers.labels(how="stop").inc()
    first.whole.observe(0.3)
    count = first.registry.get_sample_value
    assert count("unimoe_answers_total", {"how": "stop"}) == 1
    assert count("unimoe_answer_seconds_bucket", {"le": "0.25"}) == 0
    assert count("unimoe_answer_seconds_bucket", {"le": "0.5"}) == 1
    assert second.registry.get_sample_value("unimoe_answer_seconds_count") == 0
