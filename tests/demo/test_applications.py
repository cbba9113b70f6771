"""The comparison of an application: cells in order, sums by hand, and a run in miniature."""

import json
from dataclasses import replace

import pytest

from unimoe.commands import main as cli
from unimoe.demo import applications as subject
from unimoe.demo.applications import APPLICATIONS, ApplicationsDemo, plan, report


def test_the_report_pairs_by_seed(tmp_path, capsys):
    run = ApplicationsDemo(tmp_path, "recommendation", seeds=3)
    values = {"home": (0.82, 0.84, 0.83), "mmoe": (0.81, 0.82, 0.82), "shared_bottom": (0.83, 0.84, 0.84)}
    for variant in run.application.variants:
        for seed, value in enumerate(values.get(variant, (0.8, 0.8, 0.8))):
            path = run.cell(variant, seed) / "logs/test/scores.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"mean_auc": value}))
    found = report(run)["variants"]["home"]
    assert found["mean"] == pytest.approx(0.83) and found["std"] == pytest.approx(0.01)
    assert found["to mmoe"]["mean"] == pytest.approx(0.04 / 3) and found["to mmoe"]["better_in"] == 3
    assert found["to mmoe"]["verdict"] == "cannot tell"  # 0.0133 +- 0.0143
    assert found["to shared_bottom"]["mean"] == pytest.approx(-0.02 / 3)
    assert json.loads((tmp_path / "report.json").read_text())["variants"]["home"] == json.loads(
        json.dumps(found)
    )
    assert found["to mmoe_norm"]["mean"] == pytest.approx(0.03), "HoME without its norm's part"
    assert "+0.0133 ± 0.0143   better in 3 of 3  cannot tell" in capsys.readouterr().out


def test_a_lower_loss_is_better(tmp_path, capsys):
    run = ApplicationsDemo(tmp_path, "diffusion", seeds=2)
    losses = {"promoe": (0.3, 0.4), "switch_dit": (0.4, 0.4), "dense": (0.2, 0.3)}
    for variant, values in losses.items():
        for seed, value in enumerate(values):
            path = run.cell(variant, seed) / "logs/test/scores.json"
            path.parent.mkdir(parents=True)
            experts = {} if variant == "dense" else {"live_experts": [3, 4 + seed]}
            path.write_text(json.dumps({"loss": value, "probe_accuracy": 0.5, **experts}))
    found = report(run)["variants"]
    assert found["promoe"]["to switch_dit"]["mean"] == pytest.approx(-0.05)
    assert (
        found["promoe"]["to switch_dit"]["better_in"] == 1 and found["promoe"]["to dense"]["better_in"] == 0
    )
    assert found["promoe"]["beside"]["live_experts"] == {0: [3, 4], 1: [3, 5]}
    assert found["dense"]["beside"]["live_experts"] == {}
    printed = capsys.readouterr().out
    assert "loss by variant (lower is better)" in printed and "live_experts 3.7500 ± 0.3536" in printed


def test_seeds_come_one_after_another(tmp_path):
    names = [step.name for step in plan(ApplicationsDemo(tmp_path, "recommendation", seeds=2))]
    assert names[:7] == ["prepare", "home-0", "ple-0", "mmoe_norm-0", "mmoe-0", "shared_bottom-0", "home-1"]
    assert names[-1] == "report"


def test_a_base_comes_first_and_the_others_start_from_it(tmp_path, monkeypatch):
    run, called = ApplicationsDemo(tmp_path, "unified", seeds=1), []
    monkeypatch.setattr(subject, "lightning", lambda args: called.append(args))
    steps = plan(run)[1:-1]
    assert [step.name for step in steps] == ["base-0", "moe-0", "frozen-0", "pruned-0", "dense-0"]
    for step in steps:
        step.act(run)
    starts = [args[args.index("--model.adapt_from") + 1] for args in called if "--model.adapt_from" in args]
    assert starts == [str(tmp_path / "base-0")] * 8 and len(called) == 10, "fit and test of each"


def test_a_run_in_miniature(tmp_path, monkeypatch, capsys):
    rows = [f"{n % 7},{n % 5},{n % 3 == 0:d}" for n in range(80)]
    (tmp_path / "a.csv").write_text("\n".join(["user,item,click", *rows]) + "\n")
    small = [
        *("--data.train", str(tmp_path / "a.csv"), "--data.features", '{"user": "id", "item": "id"}'),
        *("--data.tasks", '{"all": {"click": "click"}}', "--data.steps", "1"),
        *("--data.val_share", "0.25"),
        *("--model.network.parameters", "3000", "--trainer.accelerator", "cpu"),
    ]
    variants = {name: [*APPLICATIONS["recommendation"].variants[name], *small] for name in ("home", "mmoe")}
    changed = replace(APPLICATIONS["recommendation"], variants=variants, rivals=["mmoe"], parts=[])
    monkeypatch.setitem(APPLICATIONS, "recommendation", changed)
    args = ["demo", "applications", "recommendation", "--output", str(tmp_path / "runs"), "--seeds", "1"]
    assert cli.main(args) == 0
    assert (tmp_path / "runs/recommendation/report.json").is_file()
    monkeypatch.setattr(subject, "lightning", None)
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "home-0: already done" in printed and " ± " not in printed
    found = json.loads((tmp_path / "runs/recommendation/report.json").read_text())["variants"]["home"]
    assert found["std"] is None, "one seed has no deviation"
    assert cli.main([*args[:-1], "0"]) == 2
    assert cli.main(["demo", "applications", "recommendations"]) == 2
    assert (
        "no application is called 'recommendations', expected one of recommendation"
        in capsys.readouterr().err
    )
