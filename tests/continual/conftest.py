"""A tiny stream and a tiny model: three text tasks whose answers differ in style, milliseconds a step."""

import json
import shutil
from functools import cache

import pytest
import torch
import yaml

from unimoe.commands.main import main
from unimoe.testing import run_together, save_tiny_llm

WORDS = ["dog", "cat", "owl", "fox", "bee", "cow"]
TASKS = {"upper": str.upper, "twice": lambda word: word + word, "last": lambda word: word[-1]}


def write_stream(folder, tasks=TASKS, steps=3):
    """Files of the tasks, and the stream's part of a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, rule in tasks.items():
        train = [
            {
                "id": f"{name}-{word}",
                "conversations": [
                    {"from": "human", "value": word},
                    {"from": "gpt", "value": rule(word)},
                ],
            }
            for word in WORDS
        ]
        test = [{"question_id": word, "text": word, "answer": rule(word)} for word in WORDS[:4]]
        (folder / f"{name}.json").write_text(json.dumps(train))
        (folder / f"{name}.test.json").write_text(json.dumps(test))
        entries.append(
            {
                "name": name,
                "train": f"{name}.json",
                "test": f"{name}.test.json",
                "scorer": "verbatim",
                "steps": steps,
                "max_new_tokens": 6,  # as long as the longest right answer
            }
        )
    return {"root": str(folder), "tasks": entries}


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    return save_tiny_llm(tmp_path_factory.mktemp("base") / "llm", layers=2, hidden_size=16)


def settings(folder, llm):
    """A run's settings on files that are written in ``folder``."""
    return {
        "stream": write_stream(folder / "data"),
        "model": {"llm": str(llm), "chat_template": "chatml"},
        "adapters": {"experts": 4, "rank": 2, "alpha": 16},
        "training": {
            "batch_size": 3,
            "lr": 0.01,
            "checkpoint_every": 1,
            "log_every": 1,
            "accelerator": "cpu",
        },
        "settings": {
            "dymoe": {"k": 4, "temperature": 0.1},
            "incmoelora": {"k": 4, "temperature": 0.1},
            "ewc": {"samples": 3},
            "replay": {"buffer": 6},
        },
        "probes": 2,
    }


@pytest.fixture
def config(tmp_path, llm):
    """A run's settings as a dict; tests change what they are about."""
    return settings(tmp_path, llm)


@pytest.fixture(scope="session")
def _runs(tmp_path_factory, llm):
    @cache
    def train(strategy, tasks):
        folder = tmp_path_factory.mktemp("finished")
        config = settings(folder, llm)
        config["stream"]["tasks"] = config["stream"]["tasks"][:tasks]
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        flags = ["-c", str(folder / "run.yaml"), "--strategy", strategy, "--output", str(folder / "run")]
        assert main(["continual", "run", *flags]) == 0
        return folder / "run"

    return train


@pytest.fixture
def finished(tmp_path, _runs):
    """Puts the folder of a finished run with the settings of ``config``, or its first tasks, in ``tmp_path``.
    Each is trained once."""

    def copy(strategy, output="run", tasks=3):
        return shutil.copytree(_runs(strategy, tasks), tmp_path / output)

    return copy


@pytest.fixture
def command(tmp_path):
    """Writes settings to a file and gives the arguments of ``unimoe continual run``."""

    def make(config, output, *flags):
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(config))
        return ["continual", "run", "-c", str(path), "--output", str(tmp_path / output), *flags]

    return make


@pytest.fixture
def write():
    """``write_stream``, for tests that want other tasks."""
    return write_stream


KILLED = """
import os, signal, sys
from unimoe.commands.main import main
from unimoe.continual.training import TaskModule

learn = TaskModule.training_step

def die(module, *batch):
    if sys.argv[1] in str(module.routing_log) and module.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return learn(module, *batch)

TaskModule.training_step = die
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def killed():
    """Runs a command line in a process that is killed at a step of a task."""

    def run(task: str, step: int, arguments: list[str]):
        with pytest.raises(RuntimeError, match="exit codes: -9$"):
            run_together(1, KILLED, task, str(step), *arguments)

    return run


def state(folder):
    """The adapters that a task left in its folder."""
    return torch.load(folder / "state.pt", weights_only=True)["adapters"]


def refused(arguments, capsys, code=2):
    """The one line on stderr of a command that is refused with this exit code."""
    capsys.readouterr()
    assert main(arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("unimoe: ")]
    assert len(errors) == 1
    return errors[0]
