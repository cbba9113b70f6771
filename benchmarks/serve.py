"""What serving together gives: tokens a second and time to the first word, beside one at a time; and a soak.

    make bench ARGS="serve runs/demo/moe"            # 1, 4 and 16 clients
    make bench ARGS="serve runs/demo/moe --soak 5"   # 20 clients for 5 minutes
    make bench ARGS="serve"                          # a tiny random model, to try the script

Two processes serve the same model, one of them with --max-batch 1; they take turns on the same questions
(every third with a picture), so that a busy machine slows both. Decoding is greedy, and every answer is
compared with the one that the same question got alone.
"""

import argparse
import io
import json
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

import openai
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from unimoe.files import data_url
from unimoe.testing import tiny_model

QUESTIONS = (
    "What is in this picture?",
    "Tell me a story.",
    "Name some animals, please.",
    "Why is the sky blue?",
)
SOAK_CLIENTS = 20
TOGETHER, ALONE = "together", "one at a time"


@dataclass(frozen=True)
class Reply:
    """One answer, and when it came."""

    text: str
    tokens: int
    first_s: float
    """From the request to its first word."""


class Served:
    """A server in a process of its own."""

    def __init__(self, url: str, process: psutil.Process):
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.process = process

    def ask(self, messages: list[Any], tokens: int) -> Reply:
        begin, first, text, used = time.perf_counter(), 0.0, [], 0
        stream: Any = self.client.chat.completions.create(
            model="model", messages=messages, max_tokens=tokens, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - begin
                text.append(chunk.choices[0].delta.content)
            used = chunk.usage.completion_tokens if chunk.usage else used
        return Reply("".join(text), used, first or time.perf_counter() - begin)

    def megabytes(self) -> float:
        return self.process.memory_info().rss / 1e6


@contextmanager
def serving(model: str, *flags: str) -> Iterator[Served]:
    """``unimoe serve``, until the block ends."""
    command = [sys.executable, "-P", "-m", "unimoe", "serve", model, "--port", "0", "--name", "model", *flags]
    quiet = subprocess.DEVNULL  # where the server logs each request
    with subprocess.Popen(command, stdout=quiet, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"running on (http://\S+)", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()  # or the pipe fills
                try:
                    yield Served(found[1], psutil.Process(process.pid))
                finally:
                    process.terminate()
                return
    sys.exit(f"unimoe: error: the server did not start: {''.join(said)}")


def questions(count: int, pictures: bool) -> list[list[Any]]:
    """Conversations of one turn, all different."""
    asked = []
    for index in range(count):
        content: list[dict[str, Any]] = [{"type": "text", "text": f"{index}: {QUESTIONS[index % 4]}"}]
        if pictures and index % 3 == 0:
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (13 * index % 256, 90, 160)).save(file, "PNG")
            url = data_url("image/png", file.getvalue())
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        asked.append([{"role": "user", "content": content}])
    return asked


def load(server: Served, asked: list[list[Any]], tokens: int, clients: int) -> tuple[list[Reply], float]:
    """All questions, ``clients`` at a time. The replies in order, and the seconds that all took."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda one: server.ask(one, tokens), asked))
    return replies, time.perf_counter() - begin


def compare(servers: dict[str, Served], asked: list[list[Any]], tokens: int, clients: list[int]) -> dict:
    """Both servers with 1, 4, ... clients; answers against those of the first."""
    for server in servers.values():
        load(server, asked[:2], tokens, 1)  # the first answers of a process are slow
    expected = [reply.text for reply in load(servers[ALONE], asked, tokens, 1)[0]]
    rows = []
    for count in clients:
        for name, server in servers.items():
            replies, seconds = load(server, asked, tokens, count)
            rows.append(
                {
                    "clients": count,
                    "served": name,
                    "tokens_per_s": sum(reply.tokens for reply in replies) / seconds,
                    "first_word_s": median(reply.first_s for reply in replies),
                    "different": sum(r.text != text for r, text in zip(replies, expected, strict=True)),
                }
            )
    return {"answers": len(asked), "tokens": tokens, "rows": rows}


def soak(server: Served, asked: list[list[Any]], tokens: int, minutes: float) -> dict:
    """20 clients without a pause. Memory counts from when each question was asked once, by all at once."""
    expected = [server.ask(one, tokens).text for one in asked]
    load(server, asked, tokens, SOAK_CLIENTS)
    before, end = server.megabytes(), time.monotonic() + 60 * minutes
    result = {
        "clients": SOAK_CLIENTS,
        "minutes": minutes,
        "answers": 0,
        "busy": 0,
        "errors": 0,
        "different": 0,
    }
    lock = threading.Lock()

    def client(start: int):
        for index in cycle([*range(start, len(asked)), *range(start)]):
            if time.monotonic() > end:
                return
            try:
                outcome = (
                    "answers" if server.ask(asked[index], tokens).text == expected[index] else "different"
                )
            except openai.RateLimitError:
                outcome = "busy"
                time.sleep(0.1)
            except openai.OpenAIError:
                outcome = "errors"
            with lock:
                result[outcome] += 1

    with ThreadPoolExecutor(SOAK_CLIENTS) as pool:
        list(pool.map(client, range(SOAK_CLIENTS)))
    return {**result, "memory_before_mb": round(before), "memory_after_mb": round(server.megabytes())}


def show(result: dict):
    console = Console()
    if "rows" not in result:
        return console.print_json(data=result)
    table = Table("clients", "served", "tokens/s", "first word (s)", "answers that differ")
    for row in result["rows"]:
        figures = (f"{row['tokens_per_s']:.1f}", f"{row['first_word_s']:.2f}", str(row["different"]))
        table.add_row(str(row["clients"]), row["served"], *figures)
    console.print(table)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a model (default: a tiny random one)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="20 clients for so long, instead")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            for part in tiny_model(Path(folder) / "parts"):
                part.save_pretrained(folder)
        model = args.model or folder
        pictures = "image" in json.loads((Path(model) / "config.json").read_text())["modalities"]
        asked = questions(max(args.questions, SOAK_CLIENTS if args.soak else 1), pictures)
        with serving(model, "--max-batch", str(args.max_batch)) as together:
            if args.soak:
                result = soak(together, asked, args.tokens, args.soak)
            else:
                with serving(model, "--max-batch", "1") as alone:
                    result = compare({ALONE: alone, TOGETHER: together}, asked, args.tokens, args.clients)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
