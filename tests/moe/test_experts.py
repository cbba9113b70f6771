from typing import Any

import pytest
import torch
from torch import nn

from unimoe.errors import UserError
from unimoe.moe import Experts, FFNExperts, MoELayer, Pairs, Routing, SwiGLUExperts, TopK


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


@pytest.mark.parametrize("act, module", [("relu", nn.ReLU()), ("gelu", nn.GELU())])
def test_one_ffn_expert_is_the_dense_ffn_to_the_last_bit(act, module):
    experts = FFNExperts(1, 16, 24, act=act, init_std=0.3)
    nn.init.normal_(experts.up_bias)
    nn.init.normal_(experts.down_bias)
    layer: Any = MoELayer(TopK(16, 1, 1), experts)
    first, last = nn.Linear(16, 24), nn.Linear(24, 16)
    with torch.no_grad():
        for linear, name in ((first, "up"), (last, "down")):
            linear.weight.copy_(getattr(experts, f"{name}_proj")[0])
            linear.bias.copy_(getattr(experts, f"{name}_bias")[0])
    x = torch.randn(2, 7, 16)
    assert torch.equal(layer(x), last(module(first(x))))


@pytest.mark.parametrize("make, found", [(SwiGLUExperts, "relu"), (FFNExperts, "silu")])
def test_another_activation_is_a_user_error(make, found):
    with pytest.raises(UserError, match=f"got the activation '{found}', expected"):
        make(2, 8, 12, act=found)


def test_experts_without_forward_say_so():
    experts = Experts()
    experts.num_experts = 1
    with pytest.raises(TypeError, match="Experts has no forward"):
        experts(torch.zeros(1, 2), torch.tensor([0, 1]))
