"""Shapes: T tokens, E experts, H hidden, I intermediate."""

import torch
from torch.nn import functional as nnf
from torch.testing import assert_close

from unimoe.moe import Pairs, Routing, SwiGLUExperts

E, H, I = 3, 8, 12  # noqa: E741


def test_one_token_through_two_experts_by_hand():
    """down(silu(gate(x)) * up(x)) of experts 0 and 2, weighted; the gate's rows come first."""
    experts = SwiGLUExperts(E, H, I, init_std=0.5)
    x_TD = torch.randn(2, H)
    expert_N = torch.tensor([0, 2])
    pairs = Pairs(torch.tensor([1, 1]), expert_N, torch.ones(2), torch.tensor([0, 1, 1, 2]))
    routing = Routing.from_pairs(pairs, torch.zeros(2, E), torch.zeros(2, E))
    found_TD = experts(x_TD, routing, torch.tensor([0.25, 2.0]))
    expected = torch.zeros(H)
    for e, weight in ((0, 0.25), (2, 2.0)):
        gate, up = experts.gate_up_proj[e, :I] @ x_TD[1], experts.gate_up_proj[e, I:] @ x_TD[1]
        expected += weight * (experts.down_proj[e] @ (nnf.silu(gate) * up))
    assert_close(found_TD[1], expected)
    assert not found_TD[0].any(), "a token without experts gets zeros"


def test_fresh_weights_have_the_deviation_that_was_asked_for():
    experts = SwiGLUExperts(4, 64, 96, init_std=0.1)
    for weight in experts.parameters():
        assert abs(weight.std().item() - 0.1) < 0.005 and abs(weight.mean().item()) < 0.005
    assert [tuple(weight.shape) for weight in experts.parameters()] == [(4, 192, 64), (4, 64, 96)]
    assert SwiGLUExperts(1, 4, 4, act="swish").extra_repr() == "experts=1, hidden=4, intermediate=4"
