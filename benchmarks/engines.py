"""Engines side by side over HTTP: ours, llama.cpp by type of weights, and vLLM.

    make bench ARGS="engines runs/demo/moe --clients 1 8 16"
    make bench ARGS="engines runs/demo/moe --data runs/demo/data/test.text_questions.jsonl --task vqa"
    make bench ARGS="engines runs/demo/moe --vllm path/to/vllm/environment/bin/python"
    make bench ARGS="engines runs/demo/moe --before 985e437 --before-model path/to/a/model/of/that/version"
    make bench ARGS="engines runs/demo/moe --long --tokens 64 --questions 8 --clients 1 8 --minutes 8"
    make bench ARGS="engines"                          # a tiny random model, to try the script

Each engine has a process of its own, and all run until the end. In each round they take turns on the same
requests for each number of clients, so a busy machine slows all of them; the best of --rounds counts, and
after --minutes no round is begun. Every third request has an image; with --long all ask for long texts.
Decoding is greedy, and every answer is compared with that of the first engine at one client. With --before
the server of an earlier commit, or of another checkout, comes first.
"""

import argparse
import base64
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from unimoe.data.sample import Message
from unimoe.evaluation.evaluate import METRICS, score
from unimoe.evaluation.questions import read_questions
from unimoe.files import data_url
from unimoe.prepare.cache import cache_folder
from unimoe.testing import tiny_model

_spec = importlib.util.spec_from_file_location("serve_benchmark", Path(__file__).with_name("serve.py"))
assert _spec and _spec.loader
serve = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = serve  # its dataclasses look there
_spec.loader.exec_module(serve)

ROOT = Path(__file__).parents[1]
ENGINES = ("torch", "f32", "f16", "q8_0")
"""Ours in torch, and llama.cpp by type of its weights."""
BEFORE, VLLM = "before", "vllm"
TOPICS = ("a dragon", "a river", "a robot", "the moon", "a cat", "an old house", "a ship", "a doctor")


@contextmanager
def checkout(before: str) -> Iterator[Path]:
    """A checkout of unimoe: the folder ``before``, or else a worktree of that commit, removed in the end."""
    if (Path(before) / "unimoe").is_dir():
        yield Path(before)
        return
    with tempfile.TemporaryDirectory() as folder:
        code, git = Path(folder) / "code", ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run(
            [*git, "add", "--quiet", "--detach", str(code), before], capture_output=True, text=True
        )
        if added.returncode:
            sys.exit(f"unimoe: error: --before {before}: neither a checkout nor a commit: {added.stderr}")
        try:
            yield code
        finally:
            subprocess.run([*git, "remove", "--force", str(code)], check=True)


def build_operators(code: Path) -> None:
    """Compile the C++ operators of a checkout: a library fits one version of its source. Where they cannot be
    compiled, that version runs without them."""
    command = [sys.executable, "-P", "-m", "unimoe.kernels.native"]
    subprocess.run(command, env=serve.environment_of(code), capture_output=True, check=False)


@contextmanager
def serving(name: str, model: str, rows: int, python: str | None) -> Iterator[tuple[Any, float]]:
    """A server on an engine, and the seconds until it took requests."""
    begin = time.perf_counter()
    if name == VLLM:
        assert python
        with vllm_server(python, model, rows) as served:
            yield served, time.perf_counter() - begin
        return
    flags = [] if name == "torch" else ["--engine", "llama.cpp", "--type", name]
    with serve.serving(model, "--max-batch", str(rows), *flags) as served:
        yield served, time.perf_counter() - begin


@contextmanager
def vllm_server(python: str, model: str, rows: int) -> Iterator[Any]:
    """vLLM's own server, in an environment that has vLLM and unimoe with its plugin."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(
            python,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            model,
            "--served-model-name",
            "model",
        ),
        *("--port", str(port), "--max-num-seqs", str(rows), "--dtype", "float32", "--enforce-eager"),
        *("--chat-template", str(Path(model) / "chat_template.jinja")),
    ]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    openmp = Path(python).absolute().parents[1] / "lib" / "libiomp5.so"  # of the CPU build, see docs/serve.md
    if openmp.is_file():
        environment.setdefault("LD_PRELOAD", str(openmp))
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while True:
                if process.poll() is not None:
                    sys.exit(f"unimoe: error: vLLM ended with {process.returncode}: {' '.join(command)}")
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            yield serve.Served(url, psutil.Process(process.pid))
        finally:
            process.terminate()


def megabytes_of_weights(name: str, model: str) -> float:
    """All weights of the model, or in llama.cpp its file and the weights of encoders and connectors."""
    media = whole = 0
    for path in Path(model).glob("*.safetensors"):
        whole += path.stat().st_size
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (no mapping)
                if key.startswith(("model.encoders.", "model.connectors.")):
                    part = file.get_slice(key)
                    count = 1
                    for size in part.get_shape():
                        count *= size
                    media += count * (2 if part.get_dtype() in ("F16", "BF16") else 4)
    if name in ("torch", BEFORE, VLLM):
        return whole / 1e6
    from unimoe.inference.gguf import source_hash

    return (media + (cache_folder() / "gguf" / f"{source_hash(model)}-{name}.gguf").stat().st_size) / 1e6


def over_http(messages: Sequence[Message]) -> list[Any]:
    """Messages with their media as data, as OpenAI's clients send them."""
    sent = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                content.append({"type": "text", "text": part["text"]})
                continue
            data = Path(part["path"]).read_bytes()
            if kind == "speech":
                audio = {"data": base64.b64encode(data).decode(), "format": Path(part["path"]).suffix[1:]}
                content.append({"type": "input_audio", "input_audio": audio})
            else:
                url = data_url(f"{kind}/{Path(part['path']).suffix[1:]}", data)
                content.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
        sent.append({"role": message["role"], "content": content})
    return sent


def grade(servers: dict[str, Any], data: str, task: str, limit: int, tokens: int) -> dict[str, Any]:
    """Scores of each engine on a file of questions."""
    questions = read_questions(data)[: limit or None]
    asked = [over_http(question.sample.messages) for question in questions]
    found = {}
    for name, server in servers.items():
        replies, _ = serve.load(server, asked, tokens, 8)
        answers = {q.id: reply.text.strip() for q, reply in zip(questions, replies, strict=True)}
        found[name] = score(METRICS[task](), questions, answers)["all"]
    return found


def long_questions(count: int) -> list[list[Any]]:
    """Distinct requests for long texts."""
    asks = (f"Write a long story about {TOPICS[i % len(TOPICS)]}, number {i}." for i in range(count))
    return [[{"role": "user", "content": ask}] for ask in asks]


def compare(
    servers: dict[str, Any],
    asked: list[Any],
    tokens: int,
    clients: list[int],
    rounds: int,
    minutes: float = math.inf,
) -> list[dict[str, Any]]:
    """A row for each number of clients and engine. A round goes over all; after ``minutes`` none begins."""
    first, end = next(iter(servers)), time.monotonic() + 60 * minutes
    for server in servers.values():
        serve.load(server, asked[:2], min(tokens, 4), 1)  # warm-up
    expected = [reply.text for reply in serve.load(servers[first], asked, tokens, 1)[0]]
    turns: dict[tuple[int, str], list[tuple[float, float, int]]] = {}
    for _ in range(rounds):
        if time.monotonic() > end:
            break
        for count, name in product(clients, servers):
            replies, seconds = serve.load(servers[name], asked, tokens, count)
            equal = sum(reply.text == text for reply, text in zip(replies, expected, strict=True))
            speed = sum(reply.tokens for reply in replies) / seconds
            turn = speed, median(reply.first_s for reply in replies), equal
            turns.setdefault((count, name), []).append(turn)
    rows = []
    for (count, name), found in turns.items():
        speed, first_s, _ = max(found)
        equal = min(turn[2] for turn in found)
        row = {"clients": count, "engine": name, "tokens_per_s": speed, "first_token_s": first_s}
        times = speed / max(turns[count, first])[0]
        rows.append({**row, "equal": equal, "rounds": len(found), "times": times})
    return rows


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        "clients", "engine", "tokens/s", "times", "first token (s)", f"equal of {result['answers']}", "rounds"
    )
    for row in result["rows"]:
        figures = (f"{row['tokens_per_s']:.1f}", f"{row['times']:.2f}", f"{row['first_token_s']:.2f}")
        table.add_row(str(row["clients"]), row["engine"], *figures, str(row["equal"]), str(row["rounds"]))
    console.print(table)
    table = Table("engine", "weights (MB)", "process (MB)", "load (s)", "score")
    for name, row in result["engines"].items():
        scores = "  ".join(f"{key} {value:.3f}" for key, value in row.get("score", {}).items())
        table.add_row(
            name, f"{row['weights_mb']:.0f}", f"{row['process_mb']:.0f}", f"{row['load_s']:.1f}", scores
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of a model (default: a tiny random one)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["torch", "f32", "q8_0"])
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM and unimoe")
    parser.add_argument("--before", metavar="COMMIT_OR_CHECKOUT", help="also serve with an earlier unimoe")
    parser.add_argument(
        "--before-model", metavar="MODEL", help="the same model in a form that the earlier unimoe reads"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48, help="maximum new tokens per answer")
    parser.add_argument(
        "--rounds", type=int, default=2, help="turns of each engine, of which the best counts"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="after these no round is begun")
    parser.add_argument("--long", action="store_true", help="ask for long texts, without images")
    parser.add_argument("--data", help="a file of questions to score")
    parser.add_argument("--task", choices=list(METRICS), default="vqa")
    parser.add_argument("--limit", type=int, default=0, help="questions to score, from the first; 0: all")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if args.model is None:
            for part in tiny_model(Path(folder) / "parts"):
                part.save_pretrained(folder)
        model = args.model or folder
        images = "image" in json.loads((Path(model) / "config.json").read_text())["modalities"]
        asked = long_questions(args.questions) if args.long else serve.questions(args.questions, images)
        servers, engines = {}, {}
        if args.before:
            earlier = args.before_model or model
            code = stack.enter_context(checkout(args.before))
            build_operators(code)
            begin = time.perf_counter()
            flags = ("--max-batch", str(max(args.clients)))
            servers[BEFORE] = stack.enter_context(serve.serving(earlier, *flags, code=code))
            seconds = time.perf_counter() - begin
            engines[BEFORE] = {"load_s": seconds, "weights_mb": megabytes_of_weights(BEFORE, earlier)}
        for name in [*args.engines, *([VLLM] if args.vllm else [])]:
            served, seconds = stack.enter_context(serving(name, model, max(args.clients), args.vllm))
            servers[name] = served
            engines[name] = {"load_s": seconds, "weights_mb": megabytes_of_weights(name, model)}
        rows = compare(servers, asked, args.tokens, args.clients, args.rounds, args.minutes)
        for name, server in servers.items():
            engines[name]["process_mb"] = server.megabytes()
        if args.data:
            for name, found in grade(servers, args.data, args.task, args.limit, args.tokens).items():
                engines[name]["score"] = found
    result = {"answers": len(asked), "tokens": args.tokens, "rows": rows, "engines": engines}
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
