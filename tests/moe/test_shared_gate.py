import pytest
import torch
from torch import nn

from unimoe.moe import MoELayer, SwiGLUExperts, TopK
from unimoe.moe.shared_gate import SharedGate


def test_sigmoid_and_one_plus_are_their_formulas():
    x = torch.randn(5, 8)
    for kind, formula in (("sigmoid", torch.sigmoid), ("one_plus", lambda logit: 1 + logit)):
        gate = SharedGate(8, kind)
        nn.init.normal_(gate.weight)
        torch.testing.assert_close(gate(x), formula(x @ gate.weight.T))


@pytest.mark.parametrize("shared", ["module", "experts"])
def test_a_fresh_one_plus_gate_leaves_the_layer_exact(shared):
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    ffn = nn.Linear(8, 8) if shared == "module" else SwiGLUExperts(2, 8, 4)
    layer = MoELayer(TopK(8, 4, 2), SwiGLUExperts(4, 8, 12), shared=ffn)
    plain = layer(x)
    layer.shared_gate = SharedGate(8, "one_plus")
    assert torch.equal(layer(x), plain)
    layer.shared_gate = SharedGate(8, "sigmoid", init_std=0.0)
    with torch.no_grad():
        layer.shared_gate.weight.zero_()
    routed = MoELayer(layer.router, layer.experts)(x)
    torch.testing.assert_close(layer(x) - routed, (plain - routed) / 2)
