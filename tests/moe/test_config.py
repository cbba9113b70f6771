import json

import pytest

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, build_router


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
    config = MoEConfig(
        router={"kind": "top_k", "gating": "softmax_topk", "renormalize": False},
        experts={"copies": 4, "slices": 2},
        placement=[1, 2],
    )
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"expert": 4}, "unknown key 'expert', did you mean 'experts'"),
        ({"experts": 4}, "moe.experts is 4, expected settings"),
        ({"experts": {"kind": "swiglue"}}, "moe.experts: unknown 'swiglue', did you mean 'swiglu'"),
        ({"experts": {"copies": 0}}, "moe.experts.copies is 0, expected at least 1"),
        ({"top_k": 5}, "moe.router.k is 5, expected 1..4"),
        (
            {"router": {"kind": "top_k", "p": 0.4}},
            "moe.router.p: top_k has no such setting, a setting of top_p",
        ),
        ({"router": {"k": [1, 5]}}, "moe.router.k is 5, expected 1..4"),
        ({"router": {"k": "two"}}, "moe.router.k is 'two', expected an integer"),
        ({"router": {"renormalize": 1}}, "moe.router.renormalize is 1, expected true or false"),
        ({"losses": {"balanced": 0.1}}, "moe.losses: unknown 'balanced', did you mean 'balance'"),
        ({"losses": {"balance": "much"}}, "moe.losses.balance is 'much', expected a coefficient"),
        ({"shared": {"gate": "tanh"}}, "moe.shared.gate is 'tanh', expected none, sigmoid, one_plus"),
        ({"preset": "mixtrl"}, "moe.preset: unknown 'mixtrl', did you mean 'mixtral'"),
        ({"num_experts": 0}, "moe.num_experts is 0"),
        ({"num_experts": 5, "slices": 2}, "moe.num_experts is 5, expected a multiple of 2"),
        ({"null_experts": -1}, "moe.router.null_experts is -1, expected at least 0"),
        ({"router": "topk"}, "moe.router: unknown 'topk', did you mean 'top_k'"),
        ({"placement": "odd"}, "moe.placement is 'odd', expected interval"),
    ],
)
def test_mistakes_are_user_errors(values, message):
    with pytest.raises(UserError, match=message):
        MoEConfig.from_dict(values)


def test_layer_that_does_not_exist():
    with pytest.raises(UserError, match="layer 9, expected 0..4"):
        MoEConfig(placement=[9]).layers(5)


def test_a_list_gives_each_layer_its_own_value():
    config = MoEConfig(router={"kind": "top_k", "k": [4, 2, 1]})
    found = [build_router(8, config, position, 3).describe().experts_per_token for position in range(3)]
    assert found == [4, 2, 1]
    with pytest.raises(UserError, match="moe.router.k lists 3 values, expected one for each of 2 layers"):
        build_router(8, config, 0, 2)


@pytest.mark.parametrize(
    ("router", "experts", "groups"),
    [
        ({"k": 2}, {"slices": 2}, "slices"),
        ({"k": [2, 4]}, {"slices": 2}, "slices"),
        ({"k": 3}, {"slices": 2}, None),
        ({"k": [2, 3]}, {"slices": 2}, None),
        ({"k": 2}, {"slices": 1}, None),
        ({"k": 2, "null_experts": 1}, {"slices": 2}, None),
        ({"k": 2, "groups": None}, {"slices": 2}, None),
    ],
)
def test_slices_of_whole_ffns_are_chosen_together_unless_the_settings_say_otherwise(router, experts, groups):
    values = {"router": router, "experts": experts}
    assert MoEConfig.for_upcycling(values).router["groups"] == groups
    assert MoEConfig.from_dict(values).router["groups"] is None, "a saved model keeps what it has"


def test_presets_decide_on_groups_themselves():
    assert MoEConfig.for_upcycling({"preset": "sliced"}).router["groups"] == "slices"
    assert MoEConfig.for_upcycling({"preset": "sliced_free"}).router["groups"] is None
    assert "groups" not in MoEConfig.for_upcycling({"router": "top_p", "experts": {"slices": 2}}).router
