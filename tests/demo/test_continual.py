"""The order of the continual demo's steps, and what is skipped; the steps themselves are tested elsewhere."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from unimoe.commands import main as cli
from unimoe.demo import continual as subject
from unimoe.demo import steps
from unimoe.files import atomic_write


@pytest.fixture
def acted(monkeypatch):
    """What was called; every step leaves its result."""
    calls = []

    def act(name, *results):
        def call(*args, **kwargs):
            calls.append((name, args))
            for result in results:
                atomic_write(Path("out") / result, '{"stage": "base", "settings": {}}')

        return call

    monkeypatch.setattr(steps, "fault", lambda part, cache: None)
    monkeypatch.setattr(subject, "build_data", act("images", "align/manifest.json"))
    monkeypatch.setattr(subject, "stages_cli", act("base", "base/stage.json"))
    monkeypatch.setattr(subject, "build_tasks", act("tasks", "data/animals.train.jsonl"))
    monkeypatch.setattr(subject, "compare", act("compare"))
    return calls


def test_the_same_command_goes_on(acted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "continual", "--output", "out", "--seed", "3"]) == 0
    assert [name for name, _ in acted] == ["images", "base", "tasks", "compare"]
    (args,) = acted[-1][1]
    assert args[-6:-4] == ["--stream.order", json.dumps(subject.TASKS)]
    assert args[-4:] == ["--seeds", "3", "--output", "out/short"]
    base, overlay = (
        yaml.safe_load(Path(after).read_text()) for word, after in pairwise(args) if word == "-c"
    )
    assert base["model"]["init_from"] == "out/base" and base["stream"]["root"] == "out/data"
    assert [task["name"] for task in overlay["stream"]["tasks"]][:5] == [*subject.TASKS]
    assert cli.main(["demo", "continual", "--output", "out", "--full"]) == 0
    assert [name for name, _ in acted[4:]] == ["compare"]
    assert "base: already done" in capsys.readouterr().out
    assert cli.main(["demo", "continual", "--output", "out", "--seed", "-1"]) == 2
