from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import (
    Context,
    MoEConfig,
    MoELayer,
    TopK,
    deal_units,
    importance_experts,
    install_moe,
    measure_importance,
    routing_context,
)
from unimoe.moe.shared_gate import SharedGate
from unimoe.moe.upcycle.importance import important_units

H, I = 16, 48  # noqa: E741


def mlp() -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2)).double()


def router(k: int, experts: int = 8) -> TopK:
    settings: Any = {"score": "logits", "renormalize": False, "gating": "softmax_topk"}
    return TopK(H, experts, k, init_std=0.0, **settings)


@pytest.mark.parametrize("shared", [0, 4])
def test_exact_all_experts_with_zero_gates_are_the_dense_ffn(shared):
    dense, x = mlp(), torch.randn(30, H, dtype=torch.float64)
    experts = importance_experts([dense], 8, shared)
    always = important_units(dense, 8, shared) if shared else None
    gate = SharedGate(H, "one_plus").double() if shared else None
    layer = MoELayer(router(8), experts, "one_plus", always, shared_gate=gate)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("experts, shared", [(8, 0), (6, 2), (1, 0), (2, 22)])
def test_exact_every_unit_belongs_to_one_expert_and_importance_is_shared_evenly(experts, shared):
    importance = torch.rand(I)
    parts = deal_units(importance, experts, shared)
    assert sorted(torch.cat(parts).tolist()) == list(range(I))
    assert {len(part) for part in parts[1:]} == {I // (experts + shared)}
    sums = torch.stack([importance[part].sum() for part in parts[1:]])
    largest = importance[torch.cat(parts[1:])].max()
    assert sums.max() - sums.min() <= largest + 1e-6
    assert not shared or importance[parts[0]].min() >= largest


def test_what_was_measured_decides_without_padding():
    dense, x = mlp(), torch.randn(2, 10, H, dtype=torch.float64)
    pad = torch.zeros(20, dtype=torch.bool)
    pad[15:] = True

    def run() -> None:
        with routing_context(Context(pad_T=pad)):
            dense(x)

    measure_importance([dense], run)
    activation = nn.functional.silu(dense.gate_proj(x)) * dense.up_proj(x)
    expected = activation.flatten(0, 1)[:15].abs().mean(0)
    torch.testing.assert_close(dense.unit_importance, expected)
    first = important_units(dense, 6, 2)
    units = expected.argsort(descending=True)[:12]
    assert torch.equal(first.down_proj.transpose(0, 1).flatten(1), dense.down_proj.weight[:, units])
    with pytest.raises(UserError, match="no token went through"):
        measure_importance([dense], lambda: None)


def test_shared_experts_of_the_configuration_are_the_most_important_units():
    model: Any = nn.Module()
    dense, x = mlp(), torch.randn(9, H, dtype=torch.float64)
    model.layers = nn.ModuleList([nn.ModuleDict({"mlp": dense})])
    expected = dense(x)
    moe = MoEConfig.from_dict(
        {
            "preset": "sparse_unified",
            "router": {"k": 6, "init_std": 0.0},
            "experts": {"slices": 6},
            "shared": {"count": 2, "gate": "one_plus"},
            "placement": "all",
        }
    )
    install_moe(model, moe)
    layer = model.layers[0]["mlp"].double()
    assert layer.shared.down_proj.shape == (2, H, 6) and layer.experts.down_proj.shape == (6, H, 6)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-9)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="cannot deal 48 units to 5 slices and 2 shared experts"):
        importance_experts([mlp()], 5, 2)
