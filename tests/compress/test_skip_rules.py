"""Rules that stay with a model: installed, saved in its plan, and loaded."""

import pytest
import torch

from unimoe.compress.odp import Ratios
from unimoe.compress.otp import Heads
from unimoe.compress.plan import Plan
from unimoe.compress.route import route
from unimoe.compress.rows import rewritten, unchanged
from unimoe.compress.skip import Thresholds
from unimoe.compress.skip_rules import install, own_rule, rule_of
from unimoe.compress.store import compress
from unimoe.errors import UserError
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral
from unimoe.testing_stock import STOCK

RULES = [
    Thresholds({"text": 0.45, "image": 0.9}, {"text": [0.7, 0.3]}, 0.5, keep_sum=True),
    Ratios([0.9, 0.0]),
    Heads(width=8),
]


@pytest.mark.parametrize("rule", RULES, ids=["thresholds", "ratios", "heads"])
def test_a_rule_is_what_its_plan_says(rule):
    assert rule_of(Plan.from_dict(Plan(skip=rule.to_plan()).to_dict()).skip) == rule


@pytest.mark.parametrize("plan", [{}, {"rule": "best"}, {"rule": "ratios", "nu": 3}])
def test_what_is_no_rule_is_one_line(plan):
    with pytest.raises(UserError, match="expected a rule out of thresholds, ratios, heads"):
        rule_of(plan)


def test_no_threshold_is_the_model_and_all_of_it_leaves_the_residual(families, ids):
    """In every family."""
    for name in (*STOCK, "unimoe"):
        model = families(name)
        layers = view(model)
        with torch.no_grad():
            before = model(input_ids=ids).logits
            install(layers, Thresholds({"text": 0.0}))
            assert torch.equal(model(input_ids=ids).logits, before), name
            install(layers, Thresholds({"text": 9.0}))
            skipped = model(input_ids=ids).logits
            assert not torch.allclose(skipped, before), name
            with rewritten(layers, lambda layer, x, index, weight: (index, weight * 0)):
                assert torch.allclose(model(input_ids=ids).logits, skipped, atol=1e-6), name
            with rewritten(layers, unchanged):
                assert torch.equal(model(input_ids=ids).logits, before), name


@pytest.mark.parametrize("rule", RULES, ids=["thresholds", "ratios", "heads"])
@pytest.mark.parametrize("name", ["mixtral", "unimoe"])
def test_a_saved_model_skips_after_loading(rule, name, families, ids, tmp_path):
    model = families(name)
    compress(model, Plan(skip=rule.to_plan()))
    with torch.no_grad():
        for layer in view(model):
            if isinstance(rule, Heads):
                torch.nn.init.normal_(layer.block.keep_head.down.weight, std=3.0)
        wanted = model(input_ids=ids).logits
        with rewritten(view(model), unchanged):
            assert not torch.allclose(model(input_ids=ids).logits, wanted)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert own_rule(view(loaded)) == rule
        assert torch.equal(loaded(input_ids=ids).logits, wanted)


def test_a_later_rule_replaces_the_one_before():
    model, seen = tiny_mixtral(), []
    install(view(model), Thresholds({"text": 9.0}))
    install(view(model), Thresholds({"text": 0.0}))

    def look(layer, x_TD, index_TK, weight_TK):
        seen.append(bool((weight_TK > 0).all()))
        return index_TK, weight_TK

    with torch.no_grad(), route(view(model), look):
        model(input_ids=torch.tensor([[3, 4]]))
    assert seen == [True, True]


def test_a_plan_for_other_layers_is_refused():
    with pytest.raises(UserError, match="expected one for each of 2 MoE layers"):
        compress(tiny_mixtral(), Plan(skip=Ratios([0.1] * 3).to_plan()))
