import pytest

from unimoe.errors import UserError
from unimoe.moe import MoEConfig
from unimoe.moe.settings import merge, parse_settings, presets


def test_a_configuration_of_0_1_loads():
    """As ``config.json`` had it, with the settings of the router that was not chosen."""
    old = {
        "num_experts": 8,
        "slices": 2,
        "router": "top_p",
        "top_k": 2,
        "top_p": 0.5,
        "null_experts": 1,
        "shared_experts": 2,
        "shared_size": 16,
        "gradient_estimator": "code",
        "placement": "all",
        "gating": "topk_softmax",
        "renormalize": False,
        "combine": "weight",
        "balance_coef": 0.025,
        "z_coef": 0.001,
        "router_init_std": 0.1,
    }
    config = MoEConfig.from_dict(old)
    assert (config.num_experts, config.experts["slices"], config.placement) == (8, 2, "all")
    wanted = {"kind": "top_p", "p": 0.5, "null_experts": 1, "gradient_estimator": "code", "init_std": 0.1}
    assert wanted.items() <= config.router.items() and not config.router["renormalize"]
    assert config.shared == {"count": 2, "size": 16, "gate": "none", "frozen": False}
    assert config.losses == {"balance": 0.025, "z": 0.001}
    assert MoEConfig.from_dict(config.to_dict()) == config


def test_an_old_setting_of_another_router_is_a_warning(caplog):
    assert MoEConfig.from_dict({"top_p": 0.5}) == MoEConfig()
    assert "moe.top_p is ignored: router top_k has no such setting" in caplog.text


def test_every_preset_is_complete_and_settings_win_over_it():
    for name in presets():
        assert MoEConfig.from_dict({"preset": name}).num_experts > 1, name
    found = MoEConfig.from_dict({"preset": "mixtral", "router": {"k": 1}, "losses": {"balance": 0.5}})
    assert (found.router["k"], found.losses["balance"], found.experts["copies"]) == (1, 0.5, 8)
    other = MoEConfig.from_dict({"preset": "mixtral", "router": {"kind": "top_p", "p": 0.3}})
    assert other.router["kind"] == "top_p" and "k" not in other.router


def test_another_kind_replaces_a_part_and_other_settings_join_it():
    under = {"router": {"kind": "top_k", "k": 2}, "losses": {"z": 0.1}}
    assert merge(under, {"router": {"k": 1}})["router"] == {"kind": "top_k", "k": 1}
    assert merge(under, {"router": {"kind": "top_p", "p": 0.5}})["router"] == {"kind": "top_p", "p": 0.5}
    assert merge(under, {"combine": "slices"}) == {**under, "combine": "slices"}


def test_settings_of_the_command_line():
    assert parse_settings(["router.k=1", "placement=[0, 2]"]) == {"router": {"k": 1}, "placement": [0, 2]}
    with pytest.raises(UserError, match="--moe placement: expected KEY=VALUE"):
        parse_settings(["placement"])
    with pytest.raises(UserError, match="not the number of experts"):
        parse_settings(["experts.copies=2"], copies=False)
