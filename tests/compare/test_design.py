import pytest

from unimoe.compare.design import read_designs
from unimoe.errors import UserError


def test_the_controls_are_always_there_and_first():
    designs = read_designs(
        ["mixtral", "dense", {"preset": "mixtral", "name": "one", "router": {"k": 1}}], [0]
    )
    assert [one.name for one in designs] == ["dense", "copies_top2", "mixtral", "one"]
    assert designs[0].moe is None
    assert [(one.moe.num_experts, one.moe.router["k"]) for one in designs[1:]] == [(4, 2), (8, 2), (8, 1)]
    assert all(one.moe.placement == [0] for one in designs[1:])


def test_schedules_are_part_of_a_design():
    given = {"name": "fading", "anneal": {"balance": {"start": 0.1, "end": 0.01, "steps": 10}}}
    fading = read_designs([given], "all")[-1]
    assert fading.anneal["balance"].at(5) == pytest.approx(0.055)
    assert fading.definition()["anneal"]["balance"]["end"] == 0.01


@pytest.mark.parametrize(
    "entry, message",
    [
        ("mixtrel", "designs: unknown 'mixtrel', did you mean 'mixtral'"),
        ({"router": {"k": 1}}, "needs a name"),
        (
            {"name": "a/../b", "router": {"k": 1}, "experts": {"kind": "x"}},
            "design b: moe.experts: unknown 'x'",
        ),
        (
            {"name": "mine", "routers": {}},
            "design mine: moe has an unknown key 'routers', did you mean 'router'",
        ),
        ({"name": "dense", "router": {"k": 1}}, "dense is the base without experts"),
        ({"name": "mine", "placement": "all"}, "design mine: placement is one for all designs"),
        ({"name": "mixtral", "router": {"k": 1}}, "two are called 'mixtral'"),
        ({"name": "mine", "anneal": {"balance": {"start": 1}}}, "design mine: model.anneal: give start, end"),
        (3, "3 is neither a name nor settings"),
    ],
)
def test_mistakes_are_named(entry, message):
    with pytest.raises(UserError, match=message):
        read_designs(["mixtral", entry], "interval")
