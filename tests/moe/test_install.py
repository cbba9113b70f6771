from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig

from unimoe.errors import UserError
from unimoe.moe import (
    Context,
    MoEConfig,
    MoELayer,
    TopK,
    TopP,
    auxiliary_loss,
    build_router,
    install_moe,
    record,
    routing_context,
)
from unimoe.moe.install import dense_mlp, moe_layers
from unimoe.moe.settings import presets


def decoder():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
    return AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes))


def test_every_placed_layer_becomes_a_mixture():
    model = decoder()
    install_moe(model, MoEConfig(experts={"copies": 2, "slices": 2}, shared={"count": 1, "size": 6}))
    assert list(moe_layers(model)) == [0, 2] and not isinstance(model.layers[1].mlp, MoELayer)
    layer = moe_layers(model)[2]
    assert (layer.num_experts, layer.num_shared, layer.experts.intermediate_size) == (4, 1, 12)


def test_the_router_is_the_configured_one():
    router = build_router(16, MoEConfig(router={"k": 3, "null_experts": 1}))
    assert isinstance(router, TopK) and (router.num_experts, router.k) == (5, 3)
    router = build_router(16, MoEConfig(router={"kind": "top_p", "p": 0.5, "null_experts": 1}))
    assert isinstance(router, TopP) and (router.num_experts, router.p) == (5, 0.5)


def test_mistakes_name_what_was_found():
    model = decoder()
    with pytest.raises(UserError, match="1 models for the experts, expected 4"):
        install_moe(model, MoEConfig(), [decoder()])
    with pytest.raises(UserError, match=r"Linear has no FFN at layers\[0\].mlp"):
        dense_mlp(nn.Linear(2, 2), 0)
    install_moe(model, MoEConfig())
    with pytest.raises(UserError, match="layer 0 is an MoE layer already"):
        install_moe(model, MoEConfig())


@pytest.mark.parametrize("name", presets())
def test_every_preset_runs_forward_and_backward(name):
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
    model: Any = AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes))
    moe = MoEConfig.from_dict({"preset": name})
    ids = torch.arange(24).reshape(2, 12)
    before = model(input_ids=ids).last_hidden_state
    if moe.router["kind"] == "experts_choose":
        with pytest.raises(UserError, match="a causal LM must not"):
            install_moe(model, moe)
        return
    install_moe(model, moe)
    assert list(moe_layers(model)) == [0, 2]
    samples = torch.arange(2).repeat_interleave(12)
    known = {"cond_BC": torch.randn(2, 16), "time_B": torch.rand(2)}  # of a diffusion transformer
    with record() as records, routing_context(Context(token_T=ids.flatten(), sample_T=samples, **known)):
        found = model.train()(input_ids=ids).last_hidden_state
    loss = found.square().mean() + auxiliary_loss(moe.losses, records, moe_layers(model))
    loss.backward()
    layer: Any = model.layers[0].mlp
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.experts.parameters())
    assert name not in EXACT or torch.allclose(found, before, rtol=0, atol=2e-6)


EXACT = {"sliced", "mixtral", "hash", "rmoe"}
"""Those whose upcycled layers start as the dense FFN."""
