"""The configurations that ship, parsed as the command line parses them."""

from importlib.resources import files
from pathlib import Path

import pytest

from unimoe.continual.cli import _parser, _settings
from unimoe.evaluation.scorers import SCORERS

FOLDER = Path(str(files("unimoe.configs").joinpath("continual")))
PATHS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "align.yaml")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_setting_is_known(path):
    parser = _parser("run")
    config, _ = _settings(parser, parser.parse_args(["-c", str(path), "--output", "x"]))
    assert len({task.name for task in config.stream.tasks}) == len(config.stream.tasks) >= 4
    assert {task.scorer for task in config.stream.tasks} <= set(SCORERS)


def test_mllm_cl_abilities_are_tested_on_files_of_their_own():
    parser = _parser("run")
    path = FOLDER / "mllm_cl_ability.yaml"
    config, _ = _settings(parser, parser.parse_args(["-c", str(path), "--output", "x"]))
    assert [task.test for task in config.stream.tasks] == [
        f"{task.name}_test/test.json" for task in config.stream.tasks
    ]
