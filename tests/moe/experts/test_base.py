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
def test_mix_is_the_general_gather_and_sum(make):
    experts = make(3, 8, 12, init_std=0.5)
    x, route = torch.randn(4, 8), routing([0, 2, 0, 2, 2], [0, 0, 2, 2, 2], 3, 4)
    weight = torch.rand(5)
    torch.testing.assert_close(experts.mix(x, route, weight), Experts.mix(experts, x, route, weight))


@pytest.mark.parametrize("make, found", [(SwiGLUExperts, "relu"), (FFNExperts, "silu")])
def test_another_activation_is_a_user_error(make, found):
    with pytest.raises(UserError, match=f"got the activation '{found}', expected"):
        make(2, 8, 12, act=found)


def test_experts_without_forward_say_so():
    experts = Experts()
    experts.num_experts = 1
    with pytest.raises(TypeError, match="Experts has no forward"):
        experts(torch.zeros(1, 2), torch.tensor([0, 1]))
