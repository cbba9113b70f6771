from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.moe import Context, MoEConfig, install_moe, pack_ternary, ternary_experts
from unimoe.moe.install import frozen_parameters, moe_layers
from unimoe.stages.trainable import Trainable, choose
from unimoe.testing import tiny_model

H, I = 16, 24  # noqa: E741


def test_experts_start_from_the_ffn():
    dense: Any = LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2))
    experts = ternary_experts([dense] * 2, 2)
    assert experts.gate_up_proj.shape == (4, I, H) and experts.down_proj.shape == (4, H, I // 2)
    assert torch.equal(experts.down_proj[1], dense.down_proj.weight[:, I // 2 :])


def test_exact_the_layer_is_the_frozen_ffn_and_one_weighted_expert():
    dense: Any = LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=2)).double()
    stack = torch.nn.ModuleDict({"mlp": dense})
    model: Any = torch.nn.Module()
    model.layers = torch.nn.ModuleList([stack])
    x = torch.randn(9, H, dtype=torch.float64)
    expected = dense(x)
    install_moe(model, MoEConfig.from_dict({"preset": "mote", "placement": "all"}))
    layer: Any = stack["mlp"]
    routing = layer.router(x, Context())
    assert len(routing.token_N) == 9 and (routing.weight_N < 1).all()
    routed = layer.experts(x, routing, routing.weight_N.double())
    torch.testing.assert_close(layer(x), expected + routed, rtol=0, atol=1e-9)


def test_only_experts_and_routers_train_and_what_is_packed_is_saved_and_loaded(tmp_path):
    model, processor = tiny_model(tmp_path, {"preset": "mote", "placement": "all"})
    groups = choose(model, [Trainable("*.layers.*.mlp.*", 1e-3)], [])
    names = {name.split(".mlp.")[1].split(".")[0] for name in groups[0].parameters}
    assert names == {"router", "experts"}
    ids = torch.arange(10, 40).reshape(2, 15)
    model(ids).logits.square().mean().backward()
    assert all(parameter.grad is None for parameter in frozen_parameters(model))
    layers: Any = moe_layers(model)
    assert len(frozen_parameters(model)) == 2 * len(layers)
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        pack_ternary(model)
        torch.testing.assert_close(model(ids).logits, before)
        model.save_pretrained(tmp_path / "packed")
        processor.save_pretrained(tmp_path / "packed")
        loaded = load_model(tmp_path / "packed")[0].eval()
        torch.testing.assert_close(loaded(ids).logits, before)
    with pytest.raises(UserError, match="expected ternary ones that are not packed yet"):
        pack_ternary(loaded)


def test_other_experts_are_not_packed(tmp_path):
    model, _ = tiny_model(tmp_path, {"placement": "all"})
    with pytest.raises(UserError, match="the model has swiglu experts, expected ternary ones"):
        pack_ternary(model)
