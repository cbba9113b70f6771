import pytest
from torch import nn
from transformers import AutoModel, LlamaConfig

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, MoELayer, TopK, TopP, build_router, install_moe
from unimoe.moe.install import dense_mlp, moe_layers


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
