"""``unimoe serve`` as a process: where it listens, and how it ends."""

import inspect
import re
import shutil
import signal
import socket
import subprocess
import sys

import httpx
import openai
import pytest
import torch

from unimoe.commands import main as cli
from unimoe.model.loading import load_model
from unimoe.serve.command import _folder_name, own_weights, serve


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
        (["--port", "70000"], "--port must be from 0 to 65535, found 70000"),
        (["--port", "-1"], "--port must be from 0 to 65535, found -1"),
        (["--host", "999.1.1.1"], "cannot listen on --host 999.1.1.1"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "  "], "--api-key is empty"),
        (["--max-body-mb", "0"], "--max-body-mb must be above 0"),
        (["--max-image-megapixels", "nan"], "--max-image-megapixels must be above 0"),
        (["--drain-seconds", "-1"], "--drain-seconds must be at least 0"),
        (["--skip", "image=high"], "expected MODALITY=THRESHOLD"),
        (["--experts", "3"], "--experts is 3, expected at most the router's 2"),
    ],
)
def test_bad_flags(folder, flags, message, capsys):
    assert cli.main(["serve", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_and_an_empty_key_in_the_environment(monkeypatch, capsys):
    monkeypatch.setattr("unimoe.serve.command.load_engine", None)  # nothing is loaded before
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert cli.main(["serve", "x", "--port", port]) == 2
        assert (
            f"cannot listen on --host 127.0.0.1 --port {port}: Address already in use"
            in capsys.readouterr().err
        )
    monkeypatch.setenv("UNIMOE_API_KEY", "")
    assert cli.main(["serve", "x"]) == 2
    assert "UNIMOE_API_KEY is empty" in capsys.readouterr().err


def test_the_name_of_this_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert _folder_name(".") == _folder_name(str(folder)) == "small"
    assert _folder_name("someone/a-model-on-the-hub") == "a-model-on-the-hub"


def test_weights_that_are_replaced_do_not_reach_a_running_server(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mine")
    weights = tmp_path / "mine" / "model.safetensors"
    model, _ = load_model(tmp_path / "mine", hub=False)
    own_weights(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # in place, as cp does
        file.seek(size // 2)
        file.write(b"\x7f" * (size - size // 2))
    with weights.open("r+b") as file:
        file.truncate(0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


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
