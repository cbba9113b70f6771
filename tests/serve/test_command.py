"""``unimoe serve`` as a process: where it listens, and how it ends."""

import inspect
import re
import signal
import subprocess
import sys

import httpx
import openai
import pytest

from unimoe.commands import main as cli
from unimoe.serve.command import serve


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "small"
    for part in tiny:
        part.save_pretrained(folder)
    return folder


def test_it_listens_to_this_machine_only(monkeypatch, folder):
    assert inspect.signature(serve).parameters["host"].default == "127.0.0.1"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-batch", "0"], "max_batch must be at least 1"),
        (["--media-root", "nowhere"], "--media-root nowhere: found no folder"),
    ],
)
def test_bad_flags(folder, flags, message, capsys):
    assert cli.main(["serve", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_lets_answers_end_refuses_new_ones_and_exits_with_0(folder):
    flags = ["--port", "0", "--api-key", "k", "--drain-seconds", "250"]  # the machine may be busy
    command = [sys.executable, "-m", "unimoe", "serve", str(folder), *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        url = next(found[1] for line in lines if (found := re.search(r"running on (http://127\S+)", line)))
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            asked = [{"role": "user", "content": "What is this?"}]
            stream = iter(
                client.chat.completions.create(model="small", messages=asked, stream=True, max_tokens=300)
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                while True:  # until the signal has arrived
                    httpx.get(f"{url}/health")
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert process.wait() == 0
