import importlib.util
import json
import sys
from pathlib import Path

import pytest

from unimoe.compare.design import read_designs
from unimoe.compare.run import read_cells
from unimoe.errors import UserError

FILE = Path(__file__).parents[2] / "benchmarks" / "zoo.py"


@pytest.fixture
def zoo(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_zoo", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registered(zoo, tmp_path, monkeypatch):
    """One experiment of a script, in a folder of its own."""
    monkeypatch.setattr(zoo, "FOLDER", tmp_path)
    monkeypatch.setattr(zoo, "PAGE", tmp_path / "zoo.md")
    monkeypatch.setattr(zoo, "TEXT", tmp_path)
    (tmp_path / "coin.yaml").write_text(
        "{design: Coin, claim: heads win, statistic: throws, direction: lower, treatment: heads,"
        " control: tails, minutes: 0, script: coin, size: one coin}"
    )
    (tmp_path / "coin.py").write_text(
        "def run(seed):\n"
        "    return {'treatment': {'value': seed + 0.1 * (seed % 2)}, 'control': {'value': seed + 1.0}}\n"
    )
    return tmp_path


def test_every_registration_can_be_run_and_the_table_is_fresh(zoo):
    experiments = zoo.read_experiments()
    assert experiments
    for one in experiments.values():
        assert len(one.seeds) >= 5 and one.minutes > 0 and one.where and one.claim, one.name
        if one.setting:
            names = [design.name for design in read_designs([one.treatment, one.control], "all")]
            assert set(one.sides.values()) <= set(names), one.name
    assert zoo.PAGE.read_text(encoding="utf-8") == zoo.table(), 'run `make bench ARGS="zoo --table"`'


def values(treatment: list[float], control: list[float]) -> dict[str, dict[int, float]]:
    return {"treatment": dict(enumerate(treatment)), "control": dict(enumerate(control))}


@pytest.mark.parametrize(
    ("direction", "shift", "outcome"),
    [
        ("lower", -1, "confirmed"),
        ("lower", 1, "contrary"),
        ("higher", 1, "confirmed"),
        ("higher", -1, "contrary"),
        ("lower", 0, "cannot tell"),
    ],
)
def test_the_interval_decides(zoo, direction, shift, outcome):
    one = zoo.Experiment("a", "A", "c", "loss", direction, "x", "y", 1, script="s")
    noise = [0.1, -0.1, 0.2, -0.2, 0.0]
    assert zoo.judge(one, values([shift + n for n in noise], [0.0] * 5))[0] == outcome
    assert zoo.judge(one, values([shift] * 4, [0.0] * 4))[0] == "cannot tell", "a seed is missing"


def test_a_run_stores_its_result_and_writes_the_table(zoo, registered, capsys):
    assert zoo.NOT_RUN in zoo.table()
    zoo.main(["--only", "coin"])
    assert "coin: confirmed: heads 2.0400, tails 3.0000, difference -0.9600" in capsys.readouterr().out
    assert "confirmed: heads" in (registered / "zoo.md").read_text()
    stored = json.loads((registered / "results" / "coin.json").read_text())
    assert stored["outcome"] == "confirmed" and list(stored["values"]["control"]) == list("01234")
    zoo.main(["--list"])
    assert "confirmed" in capsys.readouterr().out


def test_a_changed_registration_counts_as_not_run(zoo, registered):
    zoo.main(["--only", "coin"])
    path = registered / "coin.yaml"
    path.write_text(path.read_text().replace("lower", "higher"))
    zoo.main(["--table"])
    assert zoo.NOT_RUN in (registered / "zoo.md").read_text()


def test_mistakes_name_what_was_found(zoo, registered, monkeypatch):
    with pytest.raises(UserError, match="no experiment 'con', expected coin"):
        zoo.main(["--only", "con"])
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "TEXT", registered / "text")
        with pytest.raises(UserError, match=r"coin trains on .*text; benchmarks/handbook.py says how"):
            zoo.main(["--only", "coin"])
    path = registered / "coin.yaml"
    good = path.read_text()
    for old, new, message in (
        ("lower", "up", "direction is 'up', expected lower or higher"),
        ("size:", "seeds: [0, 1], size:", r"seeds is \(0, 1\), expected at least 5"),
        ("script:", "scripts:", "unknown key 'scripts'"),
        ("script: coin", "setting: scratch", "statistic is 'throws', expected loss"),
    ):
        path.write_text(good.replace(old, new))
        with pytest.raises(UserError, match=message):
            zoo.read_experiments()


def test_an_experiment_of_a_setting_runs_a_comparison(zoo, registered, capsys):
    """Plain upcycling against dense: the two controls that every comparison has."""
    (registered / "a.txt").write_text(" ".join(map(str, range(300))))
    (registered / "settings").mkdir()
    (registered / "settings" / "tiny.yaml").write_text(
        "# A tiny model\n"
        "from_scratch: {layers: 1, width: 16, ffn: 32, heads: 2}\n"
        f"data: {{train: {registered}/a.txt, test: {{a: {registered}/a.txt}}, eval_samples: 1, length: 8}}\n"
        "match: none\nplacement: all\nsteps: 1\nbatch_size: 1\n"
    )
    (registered / "tiny.yaml").write_text(
        "{design: Copies, claim: none, setting: tiny, statistic: loss, direction: lower, minutes: 1,"
        " treatment: copies_top2, control: dense}"
    )
    zoo.main(["--only", "tiny", "--output", str(registered / "out")])
    assert "tiny: " in capsys.readouterr().out and "| A tiny model |" in (registered / "zoo.md").read_text()
    stored = json.loads((registered / "results" / "tiny.json").read_text())
    assert len(stored["values"]["treatment"]) == len(stored["values"]["control"]) == 5
    assert stored["active"]["treatment"] > stored["active"]["control"] > 0
    cell = read_cells(registered / "out" / "tiny")["copies_top2", 0]
    assert all(isinstance(statistic(cell), float) for statistic in zoo.STATISTICS.values())
    assert 1 <= zoo.STATISTICS["first_max_over_mean"](cell) <= 4
