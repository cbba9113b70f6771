import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from unimoe.demo.steps import Step, configuration, exists, note_settings, run_steps, shipped
from unimoe.errors import UserError


def test_only_steps_without_a_result_run(tmp_path, capsys):
    acted = []

    def step(name):
        def act(run):
            acted.append(name)
            (run.folder / name).touch()

        return Step(name, f"makes {name}", 1.0, act, partial(exists, name))

    run = SimpleNamespace(folder=tmp_path)
    (tmp_path / "one").touch()
    run_steps(run, [step("one"), step("two")], "Purpose.")
    assert acted == ["two"]
    assert set(json.loads((tmp_path / "seconds.json").read_text())) == {"two"}
    out = capsys.readouterr().out
    assert out.startswith("Purpose.\n1 of 2 steps to do") and "[ 1/2] one: already done" in out


def test_a_configuration_is_copied_only_where_it_differs(tmp_path):
    path = shipped("uni_moe/align")
    assert configuration(path, SimpleNamespace(folder=Path("runs/demo")), "runs/demo") == path
    copy = configuration(path, SimpleNamespace(folder=tmp_path), "runs/demo", seed=3)
    assert yaml.safe_load(copy.read_text())["seed"] == 3 and "runs/demo" not in copy.read_text()


def test_settings_of_another_run_are_refused(tmp_path):
    note_settings(tmp_path, {"seed": 0})
    note_settings(tmp_path, {"seed": 0})
    with pytest.raises(UserError, match="was started with seed 0, found 1"):
        note_settings(tmp_path, {"seed": 1})
