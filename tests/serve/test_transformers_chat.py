"""`transformers chat`, the terminal program itself, against our server."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("transformers")


def _until(terminal: int, said: bytes) -> str:
    """What the program prints until ``said`` appears, or it ends."""
    printed = b""
    while said not in printed:
        try:
            printed += os.read(terminal, 4096)
        except OSError:  # the program has ended
            break
    return printed.decode()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "/v1"])
def test_a_conversation(server, path, tmp_path):
    terminal, inner = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"TERM": "dumb"}
    command = [PROGRAM, "chat", "tiny", server.url + path, "max_new_tokens=6", "do_sample=False"]
    command += ["--user", "ada", "--save-folder", str(tmp_path)]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment) as process:
        os.close(inner)
        assert "Traceback" not in _until(terminal, b"<ada>:")
        os.write(terminal, b"Hello there\n")
        answer = _until(terminal, b"Continue generating? (y/N):")  # six tokens are never the end
        os.write(terminal, b"n\n")
        assert "<tiny>:" in answer and "reaching the token limit" in answer
        _until(terminal, b"<ada>:")
        os.write(terminal, b"!exit\n")
        _until(terminal, b"<ada>:")
    os.close(terminal)
    assert process.returncode == 0
