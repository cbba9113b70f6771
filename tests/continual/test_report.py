"""Comparisons of runs, and their report."""

import json

import numpy as np

from unimoe.commands.main import main


def refused(arguments, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_compare_and_report(config, command, finished, tmp_path, capsys):
    arguments = command(config, "all", "--strategies", "lora", "dymoe", "joint", "--seeds", "0", "1")
    arguments[1] = "compare"
    for name in ("lora", "dymoe", "joint"):
        finished(name, f"all/{name}-0")
    assert main(arguments) == 0
    found = json.loads((tmp_path / "all" / "report.json").read_text())
    assert set(found["strategies"]) == {"lora", "dymoe", "joint"}
    assert set(found["strategies"]["dymoe"]["MFN"]) == {"mean", "std"}
    assert {"MFN", "MAA", "BWT", "BWT_CoIN", "MFT"} <= set(found["strategies"]["lora"])
    assert found["strategies"]["joint"]["BWT"]["mean"] is None
    assert np.array(found["strategies"]["lora"]["matrices"], dtype=float).shape == (2, 3, 3)
    page = (tmp_path / "all" / "report.html").read_text()
    assert "matrices.png" in page and (tmp_path / "all" / "drift.png").is_file()
    assert "dymoe" in capsys.readouterr().out
    assert main(["continual", "report", str(tmp_path / "all" / "dymoe-0")]) == 0
    assert "holds no finished run" in refused(["continual", "report", str(tmp_path)], capsys)


def test_only_runs_that_differ_in_strategy_and_seed_are_compared(config, command, tmp_path, capsys):
    config["stream"]["tasks"] = config["stream"]["tasks"][:2]
    for name, flags in (("a", []), ("b", ["--training.lr", "0.02"]), ("c", ["--strategy", "ewc"])):
        assert main(command(config, name, "--strategy", "lora", *flags)) == 0

    def report(*names):
        return ["continual", "report", *(str(tmp_path / name) for name in names)]

    assert main(report("a", "c")) == 0
    assert "training.lr: there 0.01, now 0.02" in refused(report("a", "b"), capsys)
    assert "are both seed 0 of lora" in refused(report("a", "a"), capsys)
    arguments = command(config, "all", "--seed", "1")
    arguments[1] = "compare"
    assert "compare takes --seeds" in refused(arguments, capsys)
