from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel

from unimoe.moe import Context, MoEConfig, install_moe, routing_context
from unimoe.moe.slot_layer import SlotMoELayer, fill_slots, slots_per_token

LAYERS = 2


class OtherExperts(nn.Module):
    """What an engine does: exactly K experts of each token, one after the other; and it writes over its
    input."""

    def __init__(self, experts):
        super().__init__()
        self.gate_up, self.down = experts.gate_up_proj, experts.down_proj

    def forward(self, x_TD, index_TK, weight_TK):
        y_TD = torch.zeros_like(x_TD)
        for token, (ids, weights) in enumerate(zip(index_TK.tolist(), weight_TK, strict=True)):
            assert len(set(ids)) == len(ids)
            for expert, weight in zip(ids, weights, strict=True):
                gate, up = (self.gate_up[expert] @ x_TD[token]).chunk(2)
                y_TD[token] += weight * (self.down[expert] @ (F.silu(gate) * up))
        x_TD.fill_(torch.nan)
        return y_TD


def mixture(moe):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    decoder = LlamaModel(config).eval()
    moe = MoEConfig.from_dict({"placement": "all", **moe})
    install_moe(decoder, moe)
    for name, weight in decoder.named_parameters():
        if ".mlp." in name:
            nn.init.normal_(weight, std=0.5)
    return decoder.layers[1].mlp, slots_per_token(moe, LAYERS)


@pytest.mark.parametrize(
    ("moe", "slots"),
    [
        ({}, 2),
        ({"router": {"kind": "top_k", "k": [1, 3]}}, 3),
        ({"router": {"kind": "top_k", "k": 2, "score": "sigmoid", "bias": "scores", "scale": 2.5}}, 2),
        ({"router": {"kind": "top_k", "k": 6, "null_experts": 4}}, 4),
        ({"router": {"kind": "top_k", "null_experts": 4}, "experts": {"null_output": "identity"}}, 2),
        ({"experts": {"slices": 2}, "router": {"k": 4, "groups": "slices"}, "combine": "k_weight"}, 4),
        ({"experts": {"slices": 2}, "combine": "one_plus", "shared": {"count": 1, "gate": "sigmoid"}}, 2),
        ({"router": {"kind": "top_p", "p": 0.6}}, 4),
        ({"router": {"kind": "top_p", "null_experts": 2}, "shared": {"count": 2, "size": 8}}, 4),
        ({"router": {"kind": "hash", "k": 2}}, 2),
    ],
)
def test_equals_the_layer_that_it_was(moe, slots):
    layer, found = mixture(moe)
    assert found == slots
    other = deepcopy(layer)
    SlotMoELayer.convert(other, slots)
    other.experts = OtherExperts(other.experts)
    x = torch.randn(2, 10, 8)
    with torch.no_grad(), routing_context(Context(token_T=torch.arange(20) % 11)):
        torch.testing.assert_close(other(x.clone()), layer(x), rtol=1e-5, atol=1e-5)


def test_slots_beyond_the_chosen_experts_weigh_nothing():
    weight_TE = torch.tensor([[0.0, 0.7, 0.0, 0.3], [0.0, 0.0, 0.0, 0.0]])
    index_TK, weight_TK = fill_slots(weight_TE, 3)
    assert weight_TK.tolist() == [pytest.approx([0.7, 0.3, 0.0]), [0.0, 0.0, 0.0]]
    assert index_TK[0, :2].tolist() == [1, 3] and all(len(set(row)) == 3 for row in index_TK.tolist())
