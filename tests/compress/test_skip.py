"""Threshold rules on routings that are written down."""

import pytest
import torch

from unimoe.compress.skip import Thresholds, check_thresholds, drop, keep_sum, parse_thresholds
from unimoe.errors import UserError
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral


def test_a_dropped_pair_has_the_sentinel_and_the_others_keep_their_weights():
    index_TK, weight_TK = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    index, weight = drop(index_TK, weight_TK, weight_TK < 0.35, 4)
    assert index.tolist() == [[2, 4], [1, 3]]
    assert torch.equal(weight, torch.tensor([[0.7, 0.0], [0.6, 0.4]]))


def test_thresholds_are_read_by_modality_or_for_all():
    assert parse_thresholds("image=0.5,text=0.2") == {"image": 0.5, "text": 0.2}
    assert set(parse_thresholds("0.3").values()) == {0.3} and "audio" in parse_thresholds("0.3")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("image", "expected MODALITY=THRESHOLD"),
        ("vidoe=0.1", "'vidoe'"),
        ("text=-0.5", "expected 0 or more"),
        ("text=nan", "expected 0 or more"),
        ("", "expected MODALITY"),
    ],
)
def test_what_is_no_threshold_is_one_line(text, found):
    with pytest.raises(UserError, match=found) as error:
        parse_thresholds(text)
    assert "\n" not in str(error.value)


def test_a_factor_of_the_layer_scales_the_score():
    """alpha^p g < tau is g < tau / alpha^p; no threshold skips nothing, whatever the factor."""
    rule = Thresholds({"text": 0.1}, {"text": [0.25, 0.75, 0.0], "image": [1.0, 0.0, 0.0]}, power=0.5)
    limit_LM = rule.limits(3)
    assert torch.allclose(limit_LM[:, 0], torch.tensor([0.2, 0.1 / 0.75**0.5, torch.inf]))
    assert not limit_LM[:, 1:].any()
    assert Thresholds(**{k: v for k, v in rule.to_plan().items() if k != "rule"}) == rule


def test_what_is_left_may_keep_the_sum_of_all():
    layer, x_TD = view(tiny_mixtral())[0], torch.zeros(2, 32)
    index_TK, weight_TK = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    index, weight = Thresholds({"text": 0.35}).apply(layer, 2, x_TD, index_TK, weight_TK)
    assert index.tolist() == [[2, 4], [1, 3]] and torch.equal(weight[0], torch.tensor([0.7, 0.0]))
    index, weight = Thresholds({"text": 0.35}, keep_sum=True).apply(layer, 2, x_TD, index_TK, weight_TK)
    assert index.tolist() == [[2, 4], [1, 3]] and torch.equal(weight[0], torch.tensor([1.0, 0.0]))


def test_a_rule_for_other_layers_is_refused():
    with pytest.raises(UserError, match="expected one for each of 4"):
        Thresholds({"text": 0.1}, {"text": [0.5, 0.5]}).check(4)
    with pytest.raises(UserError, match="expected 0 or more"):
        Thresholds({"text": -2.0}).check(4)
    assert check_thresholds({"text": 0.0}) == {"text": 0.0}


def test_the_sum_of_a_token_can_be_kept():
    weight_TK = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.1, 0.1]])
    kept_TK = weight_TK * torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = keep_sum(weight_TK, kept_TK)
    assert torch.allclose(found, torch.tensor([[2 / 3, 1 / 3, 0.0], [0.0, 0.0, 0.0]]))
