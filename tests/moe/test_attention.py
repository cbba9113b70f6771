import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, install_moe
from unimoe.moe.attention import AttentionExperts, attention_experts


def decoder(seed: int = 0, heads: int = 4, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaModel(config).double().eval()


def with_experts(sources: list[Any], kv: Any = "shared") -> Any:
    model = copy.deepcopy(sources[0])
    for index, block in enumerate(model.layers):
        own = [source.layers[index].self_attn for source in sources]
        block.self_attn = attention_experts(block.self_attn, own, kv).double()
    return model


IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("kv", ["shared", "experts"])
def test_exact_identical_experts_are_the_dense_attention(kv):
    dense = decoder()
    model = with_experts([dense] * 3, kv)
    for block in model.layers:
        nn.init.normal_(block.self_attn.gate)
    torch.testing.assert_close(model(IDS)[0], dense(IDS)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kv", ["shared", "experts"])
def test_exact_the_output_is_the_gated_sum_over_the_experts(kv):
    """Against one stock attention layer an expert."""
    sources = [decoder(seed, layers=1) for seed in range(3)]
    layers = [source.layers[0].self_attn for source in sources]
    experts = attention_experts(layers[0], layers, kv)
    nn.init.normal_(experts.gate)
    experts = experts.double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    place = sources[0].rotary_emb(x, torch.arange(7)[None])
    gate = (x @ experts.gate.T).softmax(-1)
    expected = torch.zeros_like(x)
    for expert, layer in enumerate(map(copy.deepcopy, layers)):
        if kv == "shared":
            layer.k_proj, layer.v_proj = layers[0].k_proj, layers[0].v_proj
        expected += gate[..., expert, None] * layer(x, position_embeddings=place, attention_mask=None)[0]
    found = experts(x, position_embeddings=place, attention_mask=None)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kv, heads", [("shared", 2), ("experts", 6)])
def test_exact_generation_with_a_cache_is_the_full_forward_pass(kv, heads):
    model, cache = with_experts([decoder(seed) for seed in range(3)], kv), DynamicCache()
    full = model(IDS)[0]
    parts = [model(IDS[:, at : at + 4], past_key_values=cache, use_cache=True)[0] for at in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-9)
    assert cache.layers[0].keys.shape[1] == heads


def test_the_sources_are_left_alone_and_gradients_reach_every_expert():
    sources = [decoder(seed) for seed in range(2)]
    before = sources[0](IDS)[0]
    model = with_experts(sources)
    model(IDS)[0].square().sum().backward()
    assert torch.equal(sources[0](IDS)[0], before)
    experts: Any = model.layers[1].self_attn
    for weight in (experts.gate, experts.o_proj.weight, experts.attention.q_proj.weight):
        assert weight.grad.abs().sum() > 0


def test_a_mixture_installs_them_in_its_layers():
    model, sources = decoder(), [decoder(seed) for seed in range(2)]
    moe = MoEConfig(experts={"copies": 2}, attention={}, placement=[1])
    install_moe(model, moe, sources)
    assert not isinstance(model.layers[0].self_attn, AttentionExperts)
    found: Any = model.layers[1].self_attn
    wanted = sources[1].layers[1].self_attn.o_proj.weight.unflatten(1, (2, -1))
    assert torch.equal(found.o_proj.weight.unflatten(1, (2, 2, -1))[:, :, 1], wanted)
    assert MoEConfig.from_dict(moe.to_dict()).attention == {"kv": "shared"}


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="moe.attention.kv is 'own', expected shared or experts"):
        MoEConfig(attention={"kv": "own"})
    one, other = (decoder(heads=heads).layers[0].self_attn for heads in (4, 8))
    with pytest.raises(UserError, match=r"heads are \[\(4, 2\), \(8, 2\)\], expected \(4, 2\)"):
        attention_experts(one, [one, other], "shared")
    with pytest.raises(UserError, match="Linear has not the projections q_proj"):
        attention_experts(one, [nn.Linear(2, 2)], "shared")
