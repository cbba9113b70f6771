import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.compress.pack import pack_model
from unimoe.compress.plan import Plan
from unimoe.errors import UserError
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.packed_linear import PackedEmbedding, PackedLinear
from unimoe.moe.view import view
from unimoe.testing import tiny_model


def error(found, expected):
    return (found - expected).abs().max() / expected.abs().max()


def llama(tied=True):
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_linears_and_head_of_a_model(tied):
    model = llama(tied)
    ids = torch.randint(0, 48, (1, 6))
    with torch.no_grad():
        exact = model(ids).logits
        pack_model(model, [], Plan(linears=8, head=8, group=32))
        found = model(ids).logits
    assert error(found, exact) < 5e-2
    kinds = [type(module) for module in model.modules()]
    assert nn.Linear not in kinds and kinds.count(PackedLinear) == 2 * 7 + 1
    assert (PackedEmbedding in kinds) == tied
    with torch.device("meta"):
        empty = llama(tied)
    pack_model(empty, [], Plan(linears=8, head=8, group=32))
    assert empty.state_dict().keys() == model.state_dict().keys()


def test_a_model_that_cannot_be_packed_stays_as_it_is():
    model = llama()
    with pytest.raises(UserError, match="the group 48 does not divide the width 32"):
        pack_model(model, [], Plan(linears=8, group=48))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_shared_experts_have_the_bits_of_linear_layers(tmp_path):
    moe = {
        "experts": {"copies": 4},
        "router": {"k": 1},
        "shared": {"count": 2, "size": 32},
        "placement": "all",
    }
    model = tiny_model(tmp_path, moe)[0]
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        pack_model(model, view(model), Plan(linears=8, group=32))
        found = model(input_ids=ids).logits
    assert (found - exact).norm() < 0.1 * exact.norm()
    for layer in view(model):
        assert isinstance(layer.shared, PackedExperts) and layer.shared.expert_bits == (8, 8)
        assert not isinstance(layer.experts, PackedExperts)
