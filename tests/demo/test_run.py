"""The order of steps, what is skipped, and what an output folder remembers."""

import json
from pathlib import Path

import pytest
import yaml

from unimoe.commands import main as cli
from unimoe.demo import run as subject
from unimoe.demo.run import STEPS, Demo
from unimoe.demo.steps import Step
from unimoe.files import atomic_write


@pytest.fixture
def steps(monkeypatch):
    """Three steps that note their names; ``broken`` holds the name of one that fails."""
    acted, broken = [], []

    def step(name, control=False):
        def act(run):
            acted.append(name)
            if name in broken:
                raise KeyboardInterrupt
            atomic_write(run.folder / name, "x")

        return Step(name, f"makes {name}", 2.0, act, lambda run: (run.folder / name).is_file(), control)

    def report(run):
        acted.append("report")
        content = {
            "models": {"moe": {"new_backgrounds": 0.5}},
            "baselines": {"linear_probe": {}},
            "targets": [],
            "seconds": {"total": 1.0},
        }
        atomic_write(run.folder / "report.json", json.dumps(content))
        for name in ("image.jpg", "question.flac"):
            atomic_write(run.folder / "try" / name, "x")

    last = Step("report", "writes", 0.1, report, lambda run: False)
    monkeypatch.setattr(subject, "STEPS", (step("one"), step("two", control=True), step("three"), last))
    return acted, broken


def run(*args):
    return cli.main(["demo", *map(str, args)])


def test_the_same_command_goes_on_where_it_was_cut_off(steps, tmp_path, capsys):
    acted, broken = steps
    broken.append("three")
    assert run("--output", tmp_path / "d") == 130
    assert acted == ["one", "three"]
    broken.clear()
    capsys.readouterr()
    assert run("--output", tmp_path / "d") == 0
    assert acted == ["one", "three", "three", "report"]
    out = capsys.readouterr().out
    assert "2 of 3 steps to do: about 2 min" in out
    assert "[ 1/3] one: already done" in out and "[ 2/3] three: done in" in out
    assert "unimoe chat" in out and "image.jpg" in out and "question.flac" in out
    assert set(json.loads((tmp_path / "d" / "seconds.json").read_text())) == {"one", "three", "report"}


def test_the_control_can_be_added_later(steps, tmp_path):
    acted, _ = steps
    run("--output", tmp_path)
    run("--output", tmp_path, "--control")
    assert acted == ["one", "three", "report", "two", "report"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--seed", "1"], "was started with seed 0, found 1"),
        (["--seed", "-1"], "--seed: the seed is -1, expected a number from 0 to 4294967295"),
        (["--unseen-artist", "nowhere.ttf"], "--unseen-artist nowhere.ttf: there is no such font"),
        (["--output", "{}/demo.json"], "is a file; expected a folder"),
        (["detection"], "unrecognized arguments"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(steps, tmp_path, capsys, args, says):
    run("--output", tmp_path)
    capsys.readouterr()
    assert run("--output", tmp_path, *(arg.replace("{}", str(tmp_path)) for arg in args)) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1
    assert len(steps[0]) == 3  # nothing ran again


def test_another_folder_gets_moved_configurations(tmp_path, monkeypatch):
    here = Demo(Path("runs/demo"), 0, False, "default")
    shipped = subject._configuration("align", here)
    assert shipped.parts[-2:] == ("uni_moe", "align.yaml") and "runs/demo/" in shipped.read_text()
    there = Demo(tmp_path / "x", 3, False, "default")
    for stage in ("align", "moe", "assemble"):
        moved = subject._configuration(stage, there)
        assert moved.parent == tmp_path / "x" / "configs" / "uni_moe"
        text = moved.read_text()
        assert "runs/demo" not in text and f"{tmp_path}/x/" in text
    assert yaml.safe_load(text)["seed"] == 3


def test_the_table_of_steps():
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    assert names.index("expert_image") < names.index("assemble") < names.index("moe") < names.index("report")
    assert sum(step.minutes for step in STEPS if not step.control) <= 30
    assert sum(step.minutes for step in STEPS) <= 60
