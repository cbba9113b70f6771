import json

import pytest

from unimoe.errors import UserError
from unimoe.moe import MoEConfig


@pytest.mark.parametrize(
    "placement, layers",
    [
        ("interval", [0, 2, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3, 4]),
        ("none", []),
        ([3, 1], [1, 3]),
    ],
)
def test_placement(placement, layers):
    assert MoEConfig(placement=placement).layers(5) == layers


def test_round_trip_through_json():
    config = MoEConfig(num_experts=8, placement=[1, 2], gating="softmax_topk", renormalize=False)
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"experts": 4}, "unknown key 'experts'"),
        ({"top_k": 5}, r"moe.top_k is 5, expected 1..4"),
        ({"num_experts": 0}, "moe.num_experts is 0"),
        ({"num_experts": 5, "slices": 2}, "moe.num_experts is 5, expected a multiple of 2"),
        ({"null_experts": -1}, "moe.null_experts is -1, expected at least 0"),
        ({"router": "hash"}, "moe.router is 'hash', expected top_k or top_p"),
        (
            {"gradient_estimator": "paper"},
            "moe.gradient_estimator is 'paper', which belongs to moe.router: top_p",
        ),
        ({"placement": "odd"}, "moe.placement is 'odd', expected interval"),
    ],
)
def test_mistakes_are_user_errors(values, message):
    with pytest.raises(UserError, match=message):
        MoEConfig.from_dict(values)


def test_layer_that_does_not_exist():
    with pytest.raises(UserError, match="layer 9, expected 0..4"):
        MoEConfig(placement=[9]).layers(5)
