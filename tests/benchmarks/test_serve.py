"""The soak test of the server's benchmark, on a server that is none."""

import importlib.util
import sys
import threading
from itertools import count
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_serve", ROOT / "benchmarks" / "serve.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IDLE_SECONDS", 0)
    clock = SimpleNamespace(monotonic=count().__next__, perf_counter=perf_counter, sleep=lambda seconds: None)
    monkeypatch.setattr(module, "time", clock)  # a second for each look at it
    return module


class Server:
    """Answers with the question; ``leak`` is what a request that is left keeps."""

    def __init__(self, reply, **leak):
        self.reply, self.leak, self.left, self.asked = reply, leak, 0, 0
        self.lock = threading.Lock()

    def ask(self, messages, tokens):
        with self.lock:
            self.asked += 1
        return self.reply(messages[0]["content"], tokens, 0.1)

    def leave(self, messages, tokens):
        with self.lock:
            self.left += 1

    def reconnect(self):
        pass

    def held(self):
        held = {"memory_mb": 100, "open_files": 20, "threads": 30, "rows": 0}
        return {name: value + self.leak.get(name, 0) * self.left for name, value in held.items()}


def soak(bench, **leak):
    server = Server(bench.Reply, **leak)
    asked = bench.questions(bench.SOAK_CLIENTS, images=False)
    return bench.soak(server, asked, 8, minutes=10), server


def test_some_answers_are_left_and_nothing_stays(bench):
    result, server = soak(bench)
    assert result["kept"] and result["before"] == result["after"]
    assert result["answers"] > result["left"] > 0 and result["errors"] == result["different"] == 0
    assert server.left == bench.SOAK_CLIENTS + result["left"], "as many before as there are requests"


@pytest.mark.parametrize("name", ["memory_mb", "open_files", "threads", "rows"])
def test_what_stays_is_seen(bench, name):
    result, _ = soak(bench, **{name: 1})
    assert result["left"] > 10 and not result["kept"]
