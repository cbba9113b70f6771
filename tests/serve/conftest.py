import threading
import time
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import uvicorn

from unimoe.serve.app import ServerConfig, build_app
from unimoe.testing import tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model that sees and hears, and its processor; it has never heard of ending an answer."""
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), {"num_experts": 4, "top_k": 2})
    model.generation_config.eos_token_id = None
    return model.eval(), processor


@contextmanager
def running(model, processor, **settings: Any):
    """A server at a free port of this machine, for the length of the block; its ``url`` and ``service``."""
    app = build_app(model, processor, ServerConfig(**{"name": "tiny", **settings}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    server.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.service = app.state.service
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def server(tiny):
    with running(*tiny) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
