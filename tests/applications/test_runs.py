"""Runs of every application that are killed, or shared by two processes, are the same."""

from pathlib import Path

import pytest
from torch.testing import assert_close

from unimoe.commands import main as cli
from unimoe.testing import assert_same_run, run_together

MAIN = """
import sys
from unimoe.commands.main import main
sys.exit(max(main([verb, "-c", sys.argv[1]]) for verb in sys.argv[2:]))
"""


@pytest.fixture(params=["latents", "feedback", "weather", "squares", "drawings", "adapted", "styles"])
def settings(request) -> dict:
    found = request.getfixturevalue(request.param)
    found["model"]["lr"] = 0.001  # two ranks add in another order; Adam makes steps of the smallest gradients
    return found


@pytest.mark.slow
def test_kill_9_changes_nothing(settings, command, tmp_path, caplog):
    settings |= {"data": {**settings["data"], "steps": 6}, "checkpoint_every": 2}
    whole = {**settings, "output": str(tmp_path / "whole")}
    assert cli.main(command(whole)) == 0
    die = {"class_path": "unimoe.testing.DieAt", "init_args": {"step": 5, "rank": 0}}
    dies = command({**settings, "trainer": {"accelerator": "cpu", "callbacks": [die]}})
    with pytest.raises(RuntimeError, match="exit codes: -9$"):
        run_together(1, MAIN, dies[-1], "fit")
    assert cli.main(command(settings)) == 0
    assert "resuming after step" in caplog.text
    assert_same_run(Path(settings["output"]), tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_are_one(settings, command, scores, tmp_path):
    half = settings["data"]["batch_size"] // 2
    two = {**settings, "output": str(tmp_path / "two"), "data": {**settings["data"], "batch_size": half}}
    two["trainer"] = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    assert cli.main(command(settings)) == 0
    run_together(2, MAIN, command(two)[-1], "fit", "test")
    assert_same_run(tmp_path / "two", Path(settings["output"]))
    assert cli.main(command(settings, "test")) == 0
    alone, together = scores(settings), scores(two)
    assert alone.pop("split") == together.pop("split") == "test"
    assert_close(together, alone, rtol=1e-4, atol=1e-5)
