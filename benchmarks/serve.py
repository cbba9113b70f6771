"""Continuous batching beside one request at a time: throughput and time to first token; and a soak test.

    make bench ARGS="serve runs/demo/moe"            # 1, 4 and 16 clients
    make bench ARGS="serve runs/demo/moe --soak 5"   # 20 clients for 5 minutes
    make bench ARGS="serve runs/demo/moe --soak 5 --engine llama.cpp --type q8_0"
    make bench ARGS="serve"                          # a tiny random model, to try the script

Two processes serve the same model, one of them with --max-batch 1. They take turns on the same requests
(every third with an image), so a busy machine slows both. Decoding is greedy, and every answer is compared
with the answer to the same request without batching.

A soak test leaves every fourth answer after its first words. In the end the server must hold what it held
before: no row, no more threads and open files, and memory within 5 %; else the exit status is 1.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import openai
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from unimoe.files import data_url
from unimoe.testing import tiny_model

QUESTIONS = (
    "What is in this image?",
    "Tell me a story.",
    "Name some animals, please.",
    "Why is the sky blue?",
)
SOAK_CLIENTS = 20
LEAVE_EVERY = 4
"""One in so many answers of a soak test is left before its end."""
IDLE_SECONDS = 11
"""The server's pool ends threads that were idle for 10 s when it is next asked for one."""
MEMORY_KEPT = 1.05
"""How much more memory than before a soak test a server may hold after it."""
BATCHED, SEQUENTIAL = "batched", "one at a time"


@dataclass(frozen=True)
class Reply:
    """One answer and its latency."""

    text: str
    tokens: int
    first_s: float
    """Time to first token, from the request."""


class Served:
    """A server running in its own process."""

    def __init__(self, url: str, process: psutil.Process):
        self.url, self.process = url, process
        self.client = self._connect()

    def _connect(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    def reconnect(self) -> None:
        """Close all connections: a client keeps them open, and each is a file of the server's."""
        self.client.close()
        self.client = self._connect()

    def ask(self, messages: list[Any], tokens: int) -> Reply:
        begin, first, text, used = time.perf_counter(), 0.0, [], 0
        for chunk in self._stream(messages, tokens):
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - begin
                text.append(chunk.choices[0].delta.content)
            used = chunk.usage.completion_tokens if chunk.usage else used
        return Reply("".join(text), used, first or time.perf_counter() - begin)

    def leave(self, messages: list[Any], tokens: int) -> None:
        """Ask, and disconnect after the first chunk."""
        stream = self._stream(messages, tokens)
        next(iter(stream))
        stream.close()

    def _stream(self, messages: list[Any], tokens: int) -> Any:
        return self.client.chat.completions.create(
            model="model", messages=messages, max_tokens=tokens, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip

    def megabytes(self) -> float:
        return self.process.memory_info().rss / 1e6

    def held(self) -> dict[str, int]:
        """What the server holds: megabytes of memory, open files, threads, and rows (answers that run or
        wait)."""
        page = httpx.get(f"{self.url}/metrics", timeout=60).text
        rows = re.findall(r"^unimoe_answers_(?:running|waiting) (\S+)$", page, re.M)
        return {
            "memory_mb": round(self.megabytes()),
            "open_files": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "rows": int(sum(map(float, rows))),
        }


def environment_of(code: Path) -> dict[str, str]:
    """Environment of processes that run another checkout."""
    return {**os.environ, "PYTHONPATH": str(code.resolve())}


@contextmanager
def serving(model: str, *flags: str, code: Path | None = None) -> Iterator[Served]:
    """Run ``unimoe serve`` until the block ends, of another checkout where ``code`` names one."""
    command = [sys.executable, "-P", "-m", "unimoe", "serve", model, "--port", "0", "--name", "model", *flags]
    environment = environment_of(code) if code else None
    quiet = subprocess.DEVNULL  # where the server logs each request
    with subprocess.Popen(
        command, stdout=quiet, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # or the pipe fills
                try:
                    yield Served(found[1], psutil.Process(process.pid))
                finally:
                    process.terminate()
                return
    sys.exit(f"unimoe: error: the server did not start: {''.join(lines)}")


def questions(count: int, images: bool) -> list[list[Any]]:
    """Distinct single-turn conversations."""
    asked = []
    for index in range(count):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"{index}: {QUESTIONS[index % 4]}"}]
        if images and index % 3 == 0:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (13 * index % 256, 90, 160)).save(file, "PNG")
            url = data_url("image/png", file.getvalue())
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        asked.append([{"role": "user", "content": content}])
    return asked


def load(server: Served, asked: list[list[Any]], tokens: int, clients: int) -> tuple[list[Reply], float]:
    """Send all requests, ``clients`` at a time; returns the replies in order and the total seconds."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda one: server.ask(one, tokens), asked))
    return replies, time.perf_counter() - begin


def compare(servers: dict[str, Served], asked: list[list[Any]], tokens: int, clients: list[int]) -> dict:
    """Measure both servers at each number of clients; answers are compared with the sequential ones."""
    for server in servers.values():
        load(server, asked[:2], tokens, 1)  # warm-up
    expected = [reply.text for reply in load(servers[SEQUENTIAL], asked, tokens, 1)[0]]
    rows = []
    for count in clients:
        for name, server in servers.items():
            replies, seconds = load(server, asked, tokens, count)
            rows.append(
                {
                    "clients": count,
                    "served": name,
                    "tokens_per_s": sum(reply.tokens for reply in replies) / seconds,
                    "first_token_s": median(reply.first_s for reply in replies),
                    "different": sum(r.text != text for r, text in zip(replies, expected, strict=True)),
                }
            )
    return {"answers": len(asked), "tokens": tokens, "rows": rows}


def soak(server: Served, asked: list[list[Any]], tokens: int, minutes: float) -> dict:
    """20 clients without a pause. What the server holds is compared with what it held after each request was
    sent once and as many were left."""
    expected = [server.ask(one, tokens).text for one in asked]
    load(server, asked, tokens, SOAK_CLIENTS)
    with ThreadPoolExecutor(SOAK_CLIENTS) as pool:
        list(pool.map(lambda one: server.leave(one, tokens), asked))
    before, end = settled(server, asked[0]), time.monotonic() + 60 * minutes
    counts = dict.fromkeys(("answers", "left", "busy", "errors", "different"), 0)
    lock = threading.Lock()

    def client(start: int):
        for turn, index in enumerate(cycle([*range(start, len(asked)), *range(start)]), start):
            if time.monotonic() > end:
                return
            try:
                if turn % LEAVE_EVERY == 0:
                    server.leave(asked[index], tokens)
                    outcome = "left"
                else:
                    equal = server.ask(asked[index], tokens).text == expected[index]
                    outcome = "answers" if equal else "different"
            except openai.RateLimitError:
                outcome = "busy"
                time.sleep(0.1)
            except openai.OpenAIError:
                outcome = "errors"
            with lock:
                counts[outcome] += 1

    with ThreadPoolExecutor(SOAK_CLIENTS) as pool:
        list(pool.map(client, range(SOAK_CLIENTS)))
    after = settled(server, asked[0])
    kept = after["rows"] == 0 and after["memory_mb"] <= MEMORY_KEPT * before["memory_mb"]
    kept = kept and all(after[name] <= before[name] for name in ("open_files", "threads"))
    return {
        "clients": SOAK_CLIENTS,
        "minutes": minutes,
        **counts,
        "before": before,
        "after": after,
        "kept": kept,
    }


def settled(server: Served, one: list[Any]) -> dict[str, int]:
    """What the server holds once its clients have gone."""
    server.reconnect()
    time.sleep(IDLE_SECONDS)
    server.ask(one, 1)
    server.reconnect()
    end = time.monotonic() + IDLE_SECONDS
    while (held := server.held())["rows"] and time.monotonic() < end:
        time.sleep(0.1)
    return held


def show(result: dict):
    console = Console()
    if "rows" not in result:
        return console.print_json(data=result)
    table = Table("clients", "served", "tokens/s", "first token (s)", "different answers")
    for row in result["rows"]:
        figures = (f"{row['tokens_per_s']:.1f}", f"{row['first_token_s']:.2f}", str(row["different"]))
        table.add_row(str(row["clients"]), row["served"], *figures)
    console.print(table)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a model (default: a tiny random one)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="maximum new tokens per answer")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="run 20 clients for this long instead")
    parser.add_argument("--engine", choices=["torch", "llama.cpp"], default="torch")
    parser.add_argument("--type", help="of the weights in llama.cpp")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    flags = ["--engine", args.engine, *(["--type", args.type] if args.type else [])]
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            for part in tiny_model(Path(folder) / "parts"):
                part.save_pretrained(folder)
        model = args.model or folder
        images = "image" in json.loads((Path(model) / "config.json").read_text())["modalities"]
        asked = questions(max(args.questions, SOAK_CLIENTS if args.soak else 1), images)
        with serving(model, "--max-batch", str(args.max_batch), *flags) as batched:
            if args.soak:
                result = soak(batched, asked, args.tokens, args.soak)
            else:
                with serving(model, "--max-batch", "1", *flags) as sequential:
                    result = compare(
                        {SEQUENTIAL: sequential, BATCHED: batched}, asked, args.tokens, args.clients
                    )
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    sys.exit(not result.get("kept", True))


if __name__ == "__main__":
    main()
