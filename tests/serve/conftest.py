import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import uvicorn

from unimoe.serve.app import ServerConfig, build_app
from unimoe.serve.connections import uvicorn_config
from unimoe.testing import IMAGE, SPEECH, VIDEO, tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of three media, and its processor; it has never heard of ending an answer."""
    moe, media = {"num_experts": 4, "top_k": 2}, {"image": IMAGE, "video": VIDEO, "speech": SPEECH}
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"), moe, **media)
    model.generation_config.eos_token_id = None
    return model.eval(), processor


@pytest.fixture(scope="session")
def serving(tiny):
    """``with serving(**settings) as server``: at a free port; it has ``url``, ``client`` and ``service``."""

    @contextmanager
    def run(**settings: Any):
        app = build_app(*tiny, ServerConfig(**{"name": "tiny", **settings}))
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
