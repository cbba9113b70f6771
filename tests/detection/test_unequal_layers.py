"""A detector trains on after ``unimoe compress`` left its layers with unequal numbers of experts."""

from pathlib import Path

import pytest
import torch
import yaml

from unimoe.commands import main as cli
from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.detection.evaluation.expert_usage import coactivation, effective_partners
from unimoe.detection.model.build import build_detector
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.moe_tuning import moe_tuning
from unimoe.detection.module import DetectionModule
from unimoe.model.structure import structure_of
from unimoe.moe.view import view
from unimoe.training.curve import read_curve

PLANS = {
    "pruned": Plan(keep=[[0, 1, 2, 3], [0, 2, 3]]),
    "merged": Plan(merge=[[0, 1, 2, 3], [0, 1, 1, 2]]),
}


def start(settings: dict, plan: Plan) -> tuple:
    """A mixture that a plan was carried out on, and the settings of a run that trains it."""
    folder = Path(settings["output"]).parent / "start"
    model, tokenizer = build_detector(**settings["model"].pop("detector"))
    moe_tuning(model, copies=2, slices=2)
    compress(model, plan)
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    settings["model"] |= {"init_from": str(folder), "freeze_encoders": True}
    settings["data"] |= {"steps": 1, "batch_size": 2}
    return model, settings


def fit(settings: dict) -> int:
    path = Path(settings["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return cli.main(["fit", "-c", str(path)])


@pytest.mark.parametrize("done", PLANS)
def test_a_detector_trains_layers_of_unequal_numbers_of_experts(settings, monkeypatch, done):
    plan, steps = PLANS[done], []
    model, settings = start(settings, plan)
    monkeypatch.setattr(
        DetectionModule,
        "count_load",
        lambda self, records: steps.append([(one.routing.chosen() > 0, one.real_T) for one in records]),
    )
    assert fit(settings) == 0
    after = load_detector(settings["output"])[0]
    assert [layer.num_experts for layer in view(after)] == [layer.num_experts for layer in view(model)]
    assert [layer.num_experts for layer in view(after)] == [4, 3]
    kept = Plan.from_dict(structure_of(after).plan)
    assert (kept.keep, kept.merge) == (plan.keep, plan.merge)
    before, weights = model.state_dict(), after.state_dict()
    assert weights.keys() == before.keys()
    changed = {name for name in weights if not torch.equal(weights[name], before[name])}
    for layer in view(after):
        assert {f"{layer.name}.experts.down_proj", f"{layer.name}.router.weight"} <= changed

    (row,) = [row for row in read_curve(Path(settings["output"], "logs", "metrics.csv")) if "lr" in row]
    (layers,) = steps
    originals = plan.keep or [range(4), range(3)]
    for index, ((chosen_QX, real_Q), columns) in enumerate(zip(layers, originals, strict=True)):
        visits_QX = (chosen_QX if real_Q is None else chosen_QX[real_Q]).float()
        assert visits_QX.shape[1] == len(columns)
        count_X, together_XX = visits_QX.sum(0), coactivation(visits_QX)
        copies = [column // 2 if done == "pruned" else column for column in columns]
        same_XX = torch.tensor([[one == other for other in copies] for one in copies])
        expected = {
            "load_max_over_mean": count_X.max() / count_X.mean(),
            "effective_partners": effective_partners(together_XX),
            "twins": (together_XX * same_XX).sum() / together_XX.sum(),
        }
        for name, value in expected.items():
            assert row[f"moe/layer{index:02d}/{name}"] == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("trainable", [None, ["decoder.*"]])
def test_packed_experts_are_not_trained(settings, capsys, trainable):
    settings = start(settings, Plan(bits=8, group=16))[1]
    settings["model"]["trainable"] = trainable
    assert fit(settings) == 2
    error = capsys.readouterr().err
    assert "packed in few bits and cannot be trained" in error and error.count("unimoe: error") == 1
    assert not Path(settings["output"]).exists()
