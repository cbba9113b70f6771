from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from unimoe.errors import UserError
from unimoe.moe import (
    MoELayer,
    TopK,
    copy_experts,
    read_ffn,
    read_swiglu,
    slice_ffn,
)

H, I = 32, 48  # noqa: E741


def mlp(inner=I, **kw) -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=inner, **kw))


def ffn(act: nn.Module | None = None, bias: bool = True) -> Any:
    """As a detection transformer has it; in float64, so that rounding hides nothing."""
    layers = {"fc1": nn.Linear(H, I, bias=bias), "fc2": nn.Linear(I, H, bias=bias), "act": act or nn.ReLU()}
    module: Any = nn.ModuleDict(layers).double()
    module.forward = lambda x: module.fc2(module.act(module.fc1(x)))
    module.fc1, module.fc2, module.act = (module[name] for name in layers)
    return module


def test_fused_and_separate_layouts_are_read():
    dense = mlp()
    gate_up, down = read_swiglu(dense)
    torch.testing.assert_close(gate_up, torch.cat([dense.gate_proj.weight, dense.up_proj.weight]))
    fused = Phi3MLP(Phi3Config(hidden_size=H, intermediate_size=I))
    x = torch.randn(5, H)
    torch.testing.assert_close(MoELayer(TopK(H, 1, 1), copy_experts(fused, 1))(x), fused(x))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"])
def test_experts_keep_the_activation(act):
    dense, x = mlp(hidden_act=act), torch.randn(5, H)
    experts = copy_experts(dense, 3)
    assert experts.act == {"silu": "silu", "gelu": "gelu"}.get(act, "gelu_tanh")
    torch.testing.assert_close(MoELayer(TopK(H, 3, 2), experts)(x), dense(x))


def test_other_two_layer_ffns_are_refused():
    with pytest.raises(UserError, match="LlamaMLP is not a two-layer FFN: expected linear layers up_proj"):
        read_ffn(mlp())
    with pytest.raises(UserError, match="activation SiLU, expected ReLU or GELU"):
        read_ffn(ffn(nn.SiLU()))
    with pytest.raises(UserError, match="activation GELU, expected ReLU or GELU"):
        read_ffn(ffn(nn.GELU(approximate="tanh")))
    with pytest.raises(UserError, match="width 48 in 5 slices"):
        slice_ffn(ffn(), 5)


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Sequential(nn.Linear(2, 2)), "Sequential is not a SwiGLU FFN"),
        (mlp(mlp_bias=True), "has a bias"),
        (mlp(hidden_act="relu"), "activation ReLU, expected SiLU or GELU"),
    ],
)
def test_other_ffns_are_refused_by_name(module, message):
    with pytest.raises(UserError, match=message):
        copy_experts(module, 2)
