import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Experts, FFNExperts, Pairs, Routing, SwiGLUExperts


def routing(token, expert, num_experts, tokens) -> Routing:
    edges = torch.arange(num_experts + 1)
    zeros = torch.zeros(tokens, num_experts)
    expert = torch.tensor(expert)
    offsets = torch.searchsorted(expert, edges)
    pairs = Pairs(torch.tensor(token), expert, torch.ones(len(token)), offsets)
    return Routing.from_pairs(pairs, zeros, zeros)


@pytest.mark.parametrize("make", [SwiGLUExperts, FFNExperts])
def test_the_fused_form_is_the_general_gather_and_sum(make):
    experts = make(3, 8, 12, init_std=0.5)
    x, route = torch.randn(4, 8), routing([0, 2, 0, 2, 2], [0, 0, 2, 2, 2], 3, 4)
    weight = torch.rand(5)

    class ByRows(Experts):
        def forward_rows(self, x_ND, offsets_E1, weight_N):
            """The kernel on rows that were gathered before."""
            rows = torch.arange(len(x_ND))
            expert = torch.repeat_interleave(torch.arange(3), offsets_E1.diff())
            return experts(x_ND, routing(rows.tolist(), expert.tolist(), 3, len(x_ND)), weight_N)

    torch.testing.assert_close(experts(x, route, weight), ByRows()(x, route, weight))


@pytest.mark.parametrize("make, found", [(SwiGLUExperts, "relu"), (FFNExperts, "silu")])
def test_another_activation_is_a_user_error(make, found):
    with pytest.raises(UserError, match=f"got the activation '{found}', expected"):
        make(2, 8, 12, act=found)


def test_experts_without_forward_say_so():
    experts = Experts()
    experts.num_experts = 1
    with pytest.raises(TypeError, match="Experts has no forward"):
        experts(torch.zeros(1, 2), routing([0], [0], 1, 1), torch.ones(1))
