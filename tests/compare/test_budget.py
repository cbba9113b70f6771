from dataclasses import replace

import pytest
import torch
from torch import nn

from unimoe.compare.budget import Frame, Stack, fit_width, measure
from unimoe.compare.design import Design, read_designs
from unimoe.errors import UserError
from unimoe.moe import MoEConfig
from unimoe.moe.install import install_moe

FRAME = Frame(hidden=64, width=192, layers=2, vocab_size=10)
DENSE = 3 * 64 * 192 * 2
MIXTRAL = read_designs(["mixtral"], "all")[-1]


def design(name="mine", **moe):
    return Design(name, MoEConfig.from_dict(moe))


def test_the_cost_of_a_design_is_that_of_its_layers():
    """8 experts, 2 a token, of width 40, one shared one, and the routers."""
    shared = design(router={"k": 2}, experts={"copies": 8}, shared={"count": 1})
    cost = FRAME.cost(replace(shared, width=40))
    expert, router = 3 * 64 * 40, 8 * 64
    assert cost.active == 2 * (3 * expert + router) and cost.total == 2 * (9 * expert + router)
    assert cost.bytes == 2 * cost.total
    assert FRAME.dense_cost().active == DENSE == FRAME.cost(Design("dense", None)).active


@pytest.mark.parametrize("match", ["active", "total", "bytes"])
def test_widths_from_scratch_are_solved_for(match):
    for one in (MIXTRAL, read_designs([], "all")[1], design(router={"kind": "top_p", "p": 0.4})):
        fitted = fit_width(one, FRAME, match, from_scratch=True)
        assert abs(FRAME.cost(fitted).over(FRAME.dense_cost(), match) - 1) <= 0.02
        assert fitted.moe == one.moe and fitted.width is not None


def test_widths_are_round_where_that_is_near_enough():
    assert fit_width(MIXTRAL, Frame(64, 640, 1, 10), "active", True).width % 16 == 0


def test_without_match_nothing_changes():
    assert fit_width(MIXTRAL, FRAME, "none", True) is MIXTRAL
    assert fit_width(Design("dense", None), FRAME, "active", True).width is None


def test_upcycled_experts_are_slices():
    fitted = fit_width(MIXTRAL, FRAME, "active", from_scratch=False)
    experts = fitted.moe.experts
    assert (experts["copies"], experts["slices"], fitted.width) == (4, 2, None)
    assert fitted.moe.combine == "slices" and fitted.moe.router["k"] == 2
    whole = fit_width(MIXTRAL, FRAME, "total", from_scratch=False).moe.experts
    assert (whole["copies"], whole["slices"]) == (1, 8)


def test_slices_that_shared_experts_do_not_allow_are_left_out():
    """In one slice, two shared experts would need two FFNs."""
    given = design(router={"k": 2}, experts={"copies": 4, "slices": 2}, shared={"count": 2})
    experts = fit_width(given, FRAME, "active", from_scratch=False).moe.experts
    assert (experts["copies"], experts["slices"]) == (2, 4)


def test_the_upcycled_control_keeps_whole_ffns():
    copies = read_designs([], "all")[1]
    assert fit_width(copies, FRAME, "active", from_scratch=False) is copies
    assert FRAME.cost(copies).active == pytest.approx(2 * DENSE, rel=0.01)


def test_an_impossible_width_says_which():
    with pytest.raises(UserError, match=r"its 8 experts .*active.* the nearest, 48, gives 0\.\d+ times"):
        fit_width(design(router={"k": 3}, experts={"copies": 8}), FRAME, "active", from_scratch=False)
    with pytest.raises(UserError, match=r"its 128 experts .* the nearest, 1, gives"):
        fit_width(
            design(router={"k": 1}, experts={"copies": 128}), Frame(64, 32, 1, 10), "total", from_scratch=True
        )


def test_measured_visits_and_packed_experts_count():
    stack = Stack([dense(64, 32)])
    install_moe(stack, MoEConfig(experts={"copies": 4}, placement="all"))
    experts = stack.layers[0]["mlp"].experts
    size, router = 4 * 3 * 64 * 32, 4 * 64
    assert measure(stack, {0: 1.5}).active == size * 1.5 / 4 + router
    experts.stored_bytes = lambda: 100
    assert measure(stack).bytes == 100 + 2 * router


def dense(hidden, width):
    mlp = nn.Module()
    for name, shape in {
        "gate_proj": (hidden, width),
        "up_proj": (hidden, width),
        "down_proj": (width, hidden),
    }.items():
        mlp.add_module(name, nn.Linear(*shape, bias=False))
    with torch.no_grad():
        return mlp
