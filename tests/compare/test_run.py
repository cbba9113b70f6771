import json

import pytest

from unimoe.compare import run
from unimoe.compare.run import compare
from unimoe.errors import UserError


def test_a_comparison_is_reported(small, texts):
    said = []
    found = compare(small(seeds=[0, 1, 2], match="total", val_every=1), said.append)
    assert "6 cells to train" in "\n".join(said) and "from two timed steps" in "\n".join(said)
    assert [row["design"] for row in found["rows"]] == ["dense", "copies_top2"]
    dense, copies = found["rows"]
    assert copies["total"] == pytest.approx(dense["total"], rel=0.02) and copies["active"] < copies["total"]
    assert copies["bytes"] == 2 * copies["total"]
    assert copies["difference"]["mean"]["seeds"] == 3
    assert copies["difference"]["mean"]["verdict"] in ("better", "worse", "cannot tell")
    assert copies["difference"]["mean"] == copies["difference"]["digits"]  # the one test set is judged
    assert [row["step"] for row in found["cells"][0]["curve"] if "val/loss" in row] == [0, 1, 2]
    assert found["unit"] == "bits per byte" and 7 < dense["loss"]["digits"]["mean"] < 9
    assert 1 <= copies["max_over_mean"] <= 4 and 0 <= copies["information"] <= 1
    assert 0.9 < copies["entropy"] <= 1 and copies["dead"] <= 0.5
    assert dense["entropy"] is None
    assert json.loads((texts / "out/results.json").read_text()) == json.loads(json.dumps(found))
    page = (texts / "out/report.html").read_text()
    assert all(
        word in page
        for word in (
            "copies_top2",
            "digits",
            "prose",
            "Expert load",
            "number of parameters",
            "data:image/svg+xml",
        )
    )
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_an_interrupted_comparison_loses_one_cell(small, texts, monkeypatch):
    real, trained = run.train_cell, []

    def dies(model, design, config, data, seed):
        trained.append((design.name, seed))
        if len(trained) == 3:
            raise RuntimeError("killed")
        return real(model, design, config, data, seed)

    monkeypatch.setattr(run, "train_cell", dies)
    monkeypatch.setattr(run, "estimate_seconds", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match="killed"):
        compare(small(seeds=[0, 1]))
    before = {path.name: path.read_bytes() for path in (texts / "out/cells").iterdir()}
    assert set(before) == {"dense-0.json", "copies_top2-0.json"}
    assert len(compare(small(seeds=[0, 1]))["cells"]) == 4
    assert trained[3:] == [("dense", 1), ("copies_top2", 1)]
    assert all((texts / "out/cells" / name).read_bytes() == content for name, content in before.items())

    compare(small(seeds=[0], designs=["mixtral"]))  # a later design joins, and all seeds are reported
    assert trained[5:] == [("mixtral", 0)]
    rows = json.loads((texts / "out/results.json").read_text())["rows"]
    assert {row["design"]: row["seeds"] for row in rows} == {
        "dense": [0, 1],
        "copies_top2": [0, 1],
        "mixtral": [0],
    }

    for changed, message in (
        ({"steps": 3}, "steps: there 2, now 3"),
        ({"match": "none"}, "match: there 'active', now 'none'"),
        ({"train": str(texts / "prose.txt")}, "data.train"),
    ):
        with pytest.raises(UserError, match=f"holds cells of other settings.*{message}"):
            compare(small(**changed))
    with pytest.raises(
        UserError, match=r"design mixtral of .* has other settings \(moe.router.k: there 2, now 1"
    ):
        compare(small(designs=[{"name": "mixtral", "preset": "mixtral", "router": {"k": 1}}]))
    (texts / "prose.txt").write_text("Something else. " * 40)
    with pytest.raises(UserError, match="content of data"):
        compare(small())
    assert len(trained) == 6


def test_a_loss_that_is_not_finite_fails_its_cell_only(small, monkeypatch):
    monkeypatch.setattr(run, "estimate_seconds", lambda *_: 1.0)
    said = []
    broken = {"name": "broken", "losses": {"z": float("inf")}}
    rows = {row["design"]: row for row in compare(small(designs=[broken]), said.append)["rows"]}
    assert rows["broken"]["failed"] == {0: "the loss is inf at step 0"} and not rows["broken"]["seeds"]
    assert any("broken, seed 0: failed: the loss is inf" in line for line in said)
    assert rows["copies_top2"]["loss"]["digits"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"designs": ["copies_top"]}, "designs: unknown 'copies_top', did you mean 'copies_top2'"),
        (
            {"designs": [{"name": "big", "experts": {"copies": 64}}], "match": "total"},
            "design big: no width of its 64",
        ),
        (
            {"designs": [{"name": "m", "anneal": {"p": {"start": 1, "end": 1}}}]},
            "design m: model.anneal.*knob 'p'",
        ),
        ({"output": None}, "--output FOLDER"),
        ({"train": "nowhere.txt"}, "no data file nowhere.txt"),
        ({"from_scratch": None, "base": "./nowhere"}, "base ./nowhere: .* does not exist"),
        ({"placement": "none"}, "places no experts in 2 layers"),
    ],
)
def test_refusals_write_nothing(small, texts, changed, message):
    before = sorted(texts.iterdir())
    with pytest.raises(UserError, match=message):
        compare(small(**changed))
    assert sorted(texts.iterdir()) == before


def test_empty_and_short_data_are_refused(small, texts):
    for content, message in (("  \n", "holds no text"), ("ab", "has 2 tokens, expected 17 or more")):
        (texts / "numbers.txt").write_text(content)
        with pytest.raises(UserError, match=message):
            compare(small())
    assert not (texts / "out").exists()


def test_designs_whose_layers_follow_schedules_or_use_one_another(small):
    exponential = {"start": 2.0, "end": 0.3, "steps": 1, "shape": "exp"}
    designs = [
        {"preset": "evomoe", "anneal": {"temperature": exponential, "hard": {"table": [[1, 1]]}}},
        {"preset": "rexmoe", "anneal": {"candidates": {"start": 4, "end": 8, "steps": 1}}},
        {"preset": "rmoe", "router": {"size": 8}, "anneal": {"frozen": {"table": [[1, 1]]}}},
    ]
    rows = {row["design"]: row for row in compare(small(designs=designs, match="none"), print)["rows"]}
    assert not any(row["failed"] for row in rows.values())
    assert rows["rexmoe"]["total"] - rows["copies_top2"]["total"] == (2 - 1) * 4 * 32 * 2  # router rows
    assert rows["evomoe"]["total"] == rows["copies_top2"]["total"] > rows["evomoe"]["active"]
