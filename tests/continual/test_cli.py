"""The strategies and settings of the command line."""

import pytest

from unimoe.continual.cli import _parser, _settings, strategy_of
from unimoe.continual.strategies import strategies
from unimoe.errors import UserError


def test_every_strategy_is_built_by_its_name():
    for name, kind in strategies().items():
        made, noted = strategy_of(name, {})
        assert type(made) is kind and isinstance(noted, dict)


def test_settings_of_strategies_are_parsed_into_their_types():
    made, noted = strategy_of("dymoe", {"dymoe": {"guidance": {"threshold": 0.3, "admit": ["new", "old"]}}})
    assert made.guide.config.threshold == 0.3 and made.guide.config.admit == ("new", "old")
    assert noted["k"] is None and noted["guidance"]["threshold"] == 0.3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dymoo", {}, "there is no strategy 'dymoo', expected one of dymoe, dymoe_apart, ewc"),
        ("dymoe", {"ewcc": {}}, "settings name the strategy 'ewcc'"),
        ("dymoe", {"dymoe": {"guidance": {"threshold": -1}}}, "guidance.threshold is -1"),
    ],
)
def test_what_is_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        strategy_of(name, settings)


def test_an_output_is_needed():
    parser = _parser("run")
    with pytest.raises(UserError, match="--output FOLDER"):
        _settings(parser, parser.parse_args([]))
