from typing import Any

import pytest
import torch
from torch import nn

from unimoe.moe import FFNExperts, MoELayer, TopK


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
