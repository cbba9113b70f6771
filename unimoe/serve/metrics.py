"""Counters for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """What ``/metrics`` shows of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        more: dict[str, Any] = {"registry": self.registry}
        running = Gauge("unimoe_answers_running", "Answers in the running batch", **more)
        running.set_function(lambda: engine.running)
        waiting = Gauge("unimoe_answers_waiting", "Answers that wait for their first token", **more)
        waiting.set_function(lambda: engine.waiting)
        self.answers = Counter(
            "unimoe_answers", "Ended answers: stop, length, cancelled, error, refused", ["how"], **more
        )
        self.prompt_tokens = Counter("unimoe_prompt_tokens", "Tokens of prompts, media counted", **more)
        self.answer_tokens = Counter("unimoe_answer_tokens", "Tokens of answers", **more)
        self.first = Histogram(
            "unimoe_time_to_first_token_seconds",
            "From the request to the first delta",
            buckets=SECONDS,
            **more,
        )
        self.whole = Histogram(
            "unimoe_answer_seconds", "From the request to the end of the answer", buckets=SECONDS, **more
        )

    def page(self) -> bytes:
        """Page in Prometheus' text format."""
        return generate_latest(self.registry)
