import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = "step,train/loss,train/tokens_per_second\n"


@pytest.fixture(scope="module")
def bench():
    path = ROOT / "benchmarks" / "same_losses.py"
    spec = importlib.util.spec_from_file_location("benchmarks_same_losses", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, run: str, rows: str, matrix: str = "[[1.0]]") -> None:
    (folder / run).mkdir(parents=True)
    (folder / run / "metrics.csv").write_text(HEAD + rows)
    (folder / run / "matrix.json").write_text(matrix)


def test_equal_runs_are_equal_whatever_their_speed(bench, tmp_path):
    write(tmp_path / "here", "lora-0", "0,0.5,100\n1,nan,90\n")
    write(tmp_path / "there", "lora-0", "0,0.5,200\n1,nan,\n")
    rows = bench.compare(tmp_path / "here", tmp_path / "there")
    assert rows == [("lora-0", 2, 0.0, True), ("lora-0/matrix.json", 3, 0.0, True)]


@pytest.mark.parametrize(("run", "allowed"), [("lora-0", False), ("incmoelora-0", False), ("dymoe-0", True)])
def test_only_dymoe_may_differ_by_rounding(bench, tmp_path, run, allowed):
    write(tmp_path / "here", run, "0,0.5000001,100\n")
    write(tmp_path / "there", run, "0,0.5,100\n")
    (_, _, difference, found), _ = bench.compare(tmp_path / "here", tmp_path / "there")
    assert difference == pytest.approx(2e-7) and found is allowed


def test_larger_differences_are_never_allowed(bench, tmp_path):
    write(tmp_path / "here", "dymoe-0", "0,0.501,100\n", "[[0.5]]")
    write(tmp_path / "there", "dymoe-0", "0,0.5,100\n", "[[1.0]]")
    assert [row[-1] for row in bench.compare(tmp_path / "here", tmp_path / "there")] == [False, False]


def test_a_shorter_curve_differs(bench, tmp_path):
    write(tmp_path / "here", "dymoe-0", "0,0.5,100\n")
    write(tmp_path / "there", "dymoe-0", "0,0.5,100\n1,0.4,100\n")
    (_, steps, difference, allowed), _ = bench.compare(tmp_path / "here", tmp_path / "there")
    assert (steps, difference, allowed) == (2, float("inf"), False)


def test_a_missing_run_differs(bench, tmp_path):
    write(tmp_path / "there", "lora-0", "0,0.5,100\n")
    assert [row[-1] for row in bench.compare(tmp_path / "here", tmp_path / "there")] == [False, False]


def test_a_checkout_is_the_commit_and_is_removed(bench, tmp_path, monkeypatch):
    repository, folder = tmp_path / "repository", tmp_path / "code"
    repository.mkdir()
    monkeypatch.setattr(bench, "ROOT", repository)
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    for text in ("one", "two"):
        (repository / "file").write_text(text)
        subprocess.run([*git, "add", "file"], check=True)
        subprocess.run([*git, "commit", "-qm", text], check=True)
    with bench.checkout("HEAD~1", folder) as code:
        assert (code / "file").read_text() == "one"
    assert not folder.exists()
