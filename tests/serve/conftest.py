import os
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from unimoe.inference.gguf import source_hash, write_gguf
from unimoe.inference.llama import load_llama
from unimoe.model.loading import load_model
from unimoe.serve.app import ServerConfig, build_app
from unimoe.serve.connections import uvicorn_config
from unimoe.testing import IMAGE, SPEECH, VIDEO, tiny_model

ENGINE = os.environ.get("UNIMOE_TEST_ENGINE", "torch")
ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of three modalities, and its processor; it has never heard of ending an answer."""
    moe, media = {"num_experts": 4, "top_k": 2}, {"image": IMAGE, "video": VIDEO, "speech": SPEECH}
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), moe, **media)
    model.generation_config.eos_token_id = None
    return model.eval(), processor


@pytest.fixture(scope="session")
def in_llama(tiny, tmp_path_factory):
    """The same model with its LLM in llama.cpp, in float32."""
    folder = tmp_path_factory.mktemp("llama")
    for part in tiny:
        part.save_pretrained(folder)
    model, processor = load_model(str(folder), device="cpu")  # a server decodes with ``tiny`` all the while
    write_gguf(model, processor.tokenizer, folder / "m.gguf", "f32", source_hash(folder))
    model, processor = load_llama(str(folder), gguf=folder / "m.gguf", rows=8, device="cpu")
    model.generation_config.eos_token_id = None
    yield model, processor
    model.llama.close()


@pytest.fixture(scope="session")
def served(request):
    """What the server of these tests runs: ``tiny``, or ``in_llama`` where UNIMOE_TEST_ENGINE says so."""
    return request.getfixturevalue("in_llama" if ENGINE == "llama.cpp" else "tiny")


@pytest.fixture(scope="session")
def serving(served):
    """``with serving(**settings) as server``: at a free port; it has ``url``, ``client`` and ``service``."""

    @contextmanager
    def run(parts: Any = served, **settings: Any):
        app = build_app(*parts, ServerConfig(**{"name": "tiny", **settings}))
        server = uvicorn.Server(uvicorn_config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                yield SimpleNamespace(url=url, client=client, service=app.state.service)
        finally:
            server.should_exit = True
            thread.join()

    return run


@pytest.fixture(scope="session")
def server(serving):
    with serving() as server:
        yield server


@pytest.fixture
def client(server):
    return server.client


def resident() -> int:
    """Megabytes of this process, in which the server of these tests runs."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@contextmanager
def watched_by_a_client(server):
    """Ask as an honest client all the while; gives how long the answers took, and the largest memory."""
    found = {"seconds": [], "most": resident(), "before": resident()}
    end = threading.Event()

    def ask():
        while not end.is_set():
            start = time.monotonic()
            reply = httpx.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=60)
            assert reply.status_code == 200
            found["seconds"].append(time.monotonic() - start)
            end.wait(0.1)

    def look():
        while not end.is_set():
            found["most"] = max(found["most"], resident())
            end.wait(0.02)

    threads = [threading.Thread(target=ask), threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert found["seconds"] and max(found["seconds"]) < 60


@pytest.fixture
def error_of():
    """A function: the error that a server returns for a wrong request, of which ``parts`` are the message's
    content, and ``fields`` replace those of a right one."""

    def ask(server, *parts: dict, **fields: Any) -> dict:
        body = {**ASK, **({"messages": [{"role": "user", "content": parts}]} if parts else {}), **fields}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=100)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error" and "function-after" not in error["message"]
        return error

    return ask


@pytest.fixture
def watched():
    """``with watched(server) as found``"""
    return watched_by_a_client


@pytest.fixture
def connect():
    """A function from a server to a socket that is connected to it."""

    def open_socket(server) -> socket.socket:
        host, _, port = server.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)), timeout=60)

    return open_socket
