import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm.modeling_glm import GlmAttention
from transformers.models.granite.modeling_granite import GraniteAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from unimoe.kernels import few_rows as kernel
from unimoe.kernels import native
from unimoe.moe.few_rows import few_rows
from unimoe.moe.llama_forms import ROOM, llama_form


@pytest.fixture(autouse=True)
def _operators(built):
    if native.ops() is None:
        pytest.skip("UNIMOE_NATIVE is 0, or the library does not load")
    with torch.no_grad():
        yield


def test_norms_of_llama_and_their_copies_run_in_one_operator():
    x = torch.randn(2, 3, 24)
    for kind, ours in ((LlamaRMSNorm, True), (Qwen3RMSNorm, True), (GemmaRMSNorm, False)):
        norm = kind(24)
        nn.init.normal_(norm.weight)
        expected = norm(x)
        with few_rows(norm):
            assert (type(norm) is not kind) == ours
            torch.testing.assert_close(norm(x), expected)
            assert torch.equal(norm(x.repeat(3, 1, 1)), kind.forward(norm, x.repeat(3, 1, 1)))  # many rows
        assert type(norm) is kind


def test_attention_of_other_models_is_left_alone():
    # GLM's forward is LLaMA's, but its rotary positions pair neighbours; Qwen 3 normalises its queries
    kinds = (LlamaAttention, GraniteAttention, GlmAttention, Qwen3Attention)
    assert [llama_form(kind) is not None for kind in kinds] == [True, True, False, False]


@pytest.fixture
def model():
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "attention_bias": True}
    model = LlamaModel(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()
    assert model.config._attn_implementation == "sdpa"
    return model


@pytest.fixture
def counted(monkeypatch):
    """How often the operator ran."""
    calls, run = [], kernel.attention
    monkeypatch.setattr(kernel, "attention", lambda *given: calls.append(1) or run(*given))
    return calls


def decode(model, cache, ids_BT, mask_BL=None):
    """Hidden states of each step of one token."""
    found = []
    for token in ids_BT.split(1, dim=1):
        given = {}
        if mask_BL is not None:
            mask_BL = nn.functional.pad(mask_BL, (0, 1), value=1)
            given = {"attention_mask": mask_BL, "position_ids": mask_BL.sum(1, keepdim=True) - 1}
        found.append(model(token, past_key_values=cache, use_cache=True, **given).last_hidden_state)
    return torch.cat(found, 1)


def test_tokens_one_by_one_equal_those_of_torch(model, counted):
    ids = torch.randint(50, (1, 8 + ROOM + 3))  # the cache outgrows its room
    expected = model(ids).last_hidden_state[:, 8:]
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache, use_cache=True)
    with few_rows(model):
        found = decode(model, cache, ids[:, 8:])
    assert len(counted) == 2 * (ROOM + 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == ids.shape[1]


def test_rows_padded_on_the_left_equal_those_alone(model, counted):
    ids, mask = torch.randint(50, (3, 9)), torch.ones(3, 5, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    with few_rows(model):
        found = decode(model, cache, ids[:, 5:], mask)
        assert len(counted) == 8
        alone = DynamicCache(config=model.config)
        model(ids[:1, 2:5], past_key_values=alone, use_cache=True)
        first = decode(model, alone, ids[:1, 5:])
    torch.testing.assert_close(found[:1], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:], model(ids[1:]).last_hidden_state[:, 5:], rtol=1e-4, atol=1e-4)


def test_a_cache_may_be_cut_copied_and_left_by_rows(model):
    ids = torch.randint(50, (2, 12))
    cache = DynamicCache(config=model.config)
    with few_rows(model):
        model(ids[:, :6], past_key_values=cache, use_cache=True)
        decode(model, cache, torch.zeros(2, 2, dtype=torch.long))
        cache.crop(-2)  # what followed is forgotten
        other = copy.deepcopy(cache)
        decode(model, other, torch.ones(2, 3, dtype=torch.long))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[[1]], layer.values[[1]]
        found = decode(model, cache, ids[1:, 6:])
    torch.testing.assert_close(found, model(ids[1:]).last_hidden_state[:, 6:], rtol=1e-4, atol=1e-4)


def test_everything_else_is_that_of_the_model(model, counted):
    ids = torch.randint(50, (1, 4))
    half = copy.deepcopy(model).bfloat16()
    with few_rows(model), few_rows(half):
        model(ids, use_cache=True)  # a prompt
        model(ids[:, :1], use_cache=False)
        cache = DynamicCache(config=model.config)
        half(ids, past_key_values=cache, use_cache=True)
        half(ids[:, :1], past_key_values=cache, use_cache=True)
        model.config._attn_implementation = "eager"
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert not counted
