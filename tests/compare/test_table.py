import pytest

from unimoe.compare.table import rows_of, text_table


def cell(design: str, seed: int, loss: float, failed: str = "") -> dict:
    found = {"design": design, "seed": seed, "failed": failed, "definition": {"moe": None}}
    if failed:
        return found
    cost = {"active": 1e6, "total": 2e6, "bytes": 4e6}
    measured = {"losses": {"a": loss, "b": loss + 1}, "start": {"a": 5.0, "b": 7.0}, "exact": {"a": 0.5}}
    return {**found, **measured, "cost": cost, "tokens_per_second": 10.0, "routing": {}}


def test_differences_are_paired_by_seed_and_the_best_design_stands_first():
    losses = {"dense": (3.0, 2.0, 1.0), "worse": (3.4, 2.4, 1.4), "better": (2.5, 1.5, 0.51)}
    cells = {
        (name, seed): cell(name, seed, loss) for name, of in losses.items() for seed, loss in enumerate(of)
    }
    rows = rows_of(cells, ["a", "b"])
    assert [row["design"] for row in rows] == ["dense", "better", "worse"]
    assert rows[0]["loss"]["mean"]["mean"] == pytest.approx(2.5) and rows[0]["start"]["mean"] == 6.0
    assert [row["difference"]["mean"]["verdict"] for row in rows[1:]] == ["better", "worse"]
    assert rows[2]["difference"]["a"]["mean"] == pytest.approx(0.4)
    assert rows[0]["exact"]["a"] == {"mean": 0.5, "std": 0.0}
    assert "better" in text_table(rows, "nats").splitlines()[2]


def test_failed_cells_are_counted_and_not_averaged():
    cells = {("dense", 0): cell("dense", 0, 2.0), ("dense", 1): cell("dense", 1, 0.0, "the loss is nan")}
    (row,) = rows_of(cells, ["a"])
    assert row["seeds"] == [0] and row["failed"] == {1: "the loss is nan"}
    assert "1 (1 failed)" in text_table([row], "nats")
