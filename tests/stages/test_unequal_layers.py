"""Training goes on after ``unimoe compress`` left layers with unequal numbers of experts."""

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.errors import UserError
from unimoe.model.loading import build_on_meta, load_model
from unimoe.model.structure import structure_of
from unimoe.moe.view import view
from unimoe.stages.module import StageModule
from unimoe.testing import IMAGE, SPEECH, tiny_model
from unimoe.training.curve import read_curve

MOE = {"experts": {"copies": 4}, "router": {"k": 2}, "placement": "all"}
PLANS = {
    "pruned": Plan(keep=[[0, 1, 2, 3], [0, 3]]),
    "to one": Plan(keep=[[0, 1, 2, 3], [2]]),
    "merged": Plan(merge=[[0, 1, 2, 3], [0, 1, 1, 0]]),
}


@pytest.fixture
def train(world, fit, tmp_path):
    """Trains a compressed model for two steps; returns the model before, and the folder of the result."""

    def run(plan: Plan, match: str = "*.mlp.*", moe=MOE, **trained):
        model, processor = tiny_model(tmp_path / "parts", moe, image=IMAGE, speech=SPEECH)
        compress(model, plan)
        for saved in (model, processor):
            saved.save_pretrained(tmp_path / "start")
        start = {"init_from": str(tmp_path / "start")}
        start |= trained or {"trainable": [{"match": match, "lr": 1e-2}]}
        data = {"train": str(world / "train.jsonl"), "steps": 2, "batch_size": 3}
        fit({"stage": "moe", "output": str(tmp_path / "out"), "model": start, "data": data})
        return model, tmp_path / "out"

    return run


@pytest.fixture
def counted(monkeypatch):
    """Pairs of each expert in each micro-batch, layer by layer, counted one by one."""
    found: list[list[torch.Tensor]] = []

    def count_load(self, records):
        found.append([])
        for one in records:
            real_T = one.real_T if one.real_T is not None else torch.ones(one.routing.num_tokens).bool()
            pairs = zip(one.routing.token_N.tolist(), one.routing.expert_N.tolist(), strict=True)
            count_E = torch.zeros(one.routing.num_experts)
            for token, expert in pairs:
                count_E[expert] += float(real_T[token])
            found[-1].append(count_E)

    monkeypatch.setattr(StageModule, "count_load", count_load)
    return found


@pytest.mark.parametrize("done", PLANS)
def test_a_stage_trains_layers_of_unequal_numbers_of_experts(train, counted, done):
    plan = PLANS[done]
    model, out = train(plan)
    expected = [layer.num_experts for layer in view(model)]
    assert expected == [4, 1 if done == "to one" else 2]
    before = model.state_dict()
    for after in (load_model(out, device="cpu")[0], AutoModelForMultimodalLM.from_pretrained(out)):
        assert [layer.num_experts for layer in view(after)] == expected
        kept = Plan.from_dict(structure_of(after).plan)
        assert (kept.keep, kept.merge) == (plan.keep, plan.merge)
        weights = after.state_dict()
        assert weights.keys() == before.keys()
        changed = {name for name, weight in weights.items() if not torch.equal(weight, before[name])}
        assert changed and all(".mlp." in name for name in changed)
        assert {f"model.language_model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)} <= changed
    rows = read_curve(out / "logs" / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 1] and len(counted) == 2
    for row, layers in zip(rows, counted, strict=True):
        assert [len(count_E) for count_E in layers] == expected
        for layer, count_E in enumerate(layers):
            shown = row[f"moe/layer{layer:02d}/load_max_over_mean"]
            assert shown == pytest.approx(float(count_E.max() / count_E.mean()), rel=1e-5)


def test_adapters_of_unequal_layers_are_merged_into_their_experts(train):
    model, out = train(PLANS["pruned"], lora=[{"layers": "experts", "rank": 2, "lr": 1e-2}])
    before, after = model.state_dict(), load_model(out, device="cpu")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {f"model.language_model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)} <= changed


def test_other_ranks_build_the_model_of_the_plan(tmp_path):
    model, _ = tiny_model(tmp_path, MOE)
    compress(model, PLANS["pruned"])
    built = build_on_meta(model.config)
    shapes = [{name: one.shape for name, one in each.state_dict().items()} for each in (model, built)]
    assert shapes[0] == shapes[1] and [layer.num_experts for layer in view(built)] == [4, 2]


@pytest.mark.parametrize("match", ["*.mlp.*", "*.mlp.experts.gate_up_proj", "lm_head.*"])
def test_packed_weights_are_not_trained(train, tmp_path, match):
    with pytest.raises(UserError, match="packed in few bits and cannot be trained"):
        train(Plan(bits=8, head=8, group=16), match)
    assert not (tmp_path / "out").exists()


def test_what_surrounds_packed_weights_trains(train):
    model, out = train(Plan(bits=8, group=16), "model.connectors.*")
    before, after = model.state_dict(), load_model(out, device="cpu")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.connectors.") for name in changed)


LORA = {"lora": [{"layers": "attention", "rank": 2}]}


@pytest.mark.parametrize("trained", [{}, LORA])
def test_merged_experts_whose_bias_follows_their_load_are_not_trained(train, tmp_path, trained):
    moe = MOE | {"router": {"k": 2, "bias": "scores"}}
    with pytest.raises(UserError, match="were merged, and its routers have a bias that follows the load"):
        train(PLANS["merged"], moe=moe, **trained)
    assert not (tmp_path / "out").exists()
