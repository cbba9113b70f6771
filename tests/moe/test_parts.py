import inspect
from typing import Any

import pytest

import unimoe.moe  # noqa: F401  (fills the registries)
from unimoe.errors import UserError
from unimoe.moe.parts import CAPACITY, COMBINE, EXPERTS, LOSSES, ROUTERS, Part, Place, Registry

REGISTRIES = (ROUTERS, EXPERTS, LOSSES, COMBINE, CAPACITY)
PARTS = [pytest.param(part, id=f"{one.kind}-{part.name}") for one in REGISTRIES for part in one.values()]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_says_where_it_comes_from_and_what_its_settings_mean(part: Part):
    assert part.source and part.summary
    assert part.settings.keys() <= {name for name, text in part.descriptions.items() if text}


def registry() -> Registry:
    parts = Registry("widget")

    @parts.register("round", source="an example")
    def round_widget(hidden_size: int, position: int, radius: float = 1.0) -> tuple[Any, ...]:
        return hidden_size, position, radius

    @parts.register("square", source="an example")
    class Square:
        knobs = ("side",)

        def __init__(self, side: int = 2):
            self.side = side

    return parts


def test_settings_are_completed_and_what_the_model_knows_is_given():
    parts = registry()
    assert parts.complete({"kind": "round"}) == {"kind": "round", "radius": 1.0}
    assert parts.build({"kind": "round", "radius": 3.0}, Place(8, 4, position=1)) == (8, 1, 3.0)


def test_a_knob_may_differ_between_layers():
    parts, settings = registry(), {"kind": "square", "side": [5, 6]}
    assert [parts.build(settings, Place(8, 4, position=one, positions=2)).side for one in (0, 1)] == [5, 6]
    with pytest.raises(UserError, match="moe.widget.side lists 2 values, expected one for each of 3 layers"):
        parts.build(settings, Place(8, 4, positions=3))


def test_mistakes_name_the_nearest_or_the_owner():
    parts = registry()
    with pytest.raises(
        UserError, match=r"moe.widget: unknown 'rund', did you mean 'round'. .known: round, square"
    ):
        parts.find("rund")
    with pytest.raises(UserError, match="moe.widget.side: round has no such setting, a setting of square"):
        parts.complete({"kind": "round", "side": 1})
    with pytest.raises(UserError, match="moe.widget.radus: round has no such setting, did you mean 'radius'"):
        parts.complete({"kind": "round", "radus": 1})


def test_what_the_model_gives_is_no_setting():
    for one in REGISTRIES:
        for part in one.values():
            given = {"hidden_size", "num_experts", "mlps", "records", "layers", "across"}
            assert not given & part.settings.keys(), (part.name, inspect.signature(part.build))


def test_what_has_no_exact_start_says_what_heals_it():
    for one in (ROUTERS, EXPERTS, COMBINE):
        for part in one.values():
            assert part.exact or part.healing, part.name
