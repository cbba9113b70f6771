import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, install_moe, join_experts
from unimoe.moe.install import moe_layers

IDS = torch.arange(20).reshape(2, 10)


def mixture(seed: int = 0, **moe: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes))
    settings = {"router": {"kind": "top_k", "k": 1, "init_std": 1.0}, "placement": "all"}
    config = MoEConfig.from_dict({**settings, "experts": {"copies": 4, "noise": 0.5}, **moe})
    install_moe(model.model, config)
    model.config.moe = config.to_dict()
    return model.double()


@pytest.mark.parametrize("gating", ["topk_softmax", "softmax_topk"])
@pytest.mark.parametrize("k", [1, 2])
def test_exact_two_equal_models_with_twice_as_many_experts_a_token(gating, k):
    router = {"kind": "top_k", "k": k, "gating": gating, "renormalize": False, "init_std": 1.0}
    model = mixture(router=router)
    before = model(input_ids=IDS).logits
    join_experts(model, copy.deepcopy(model))
    for layer in moe_layers(model).values():
        assert layer.num_experts == layer.router.num_experts == layer.experts.num_experts == 8
        layer.router.k = 2 * k
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=0, atol=1e-9)


def test_experts_and_rows_of_both_and_the_mean_of_the_rest():
    model, other = mixture(0, shared={"count": 1}), mixture(1, shared={"count": 1})
    mine, own = moe_layers(copy.deepcopy(model))[0], moe_layers(other)[0]
    head = (model.lm_head.weight + other.lm_head.weight) / 2
    shared = (mine.shared.down_proj + own.shared.down_proj) / 2
    join_experts(model, other)
    joined: Any = moe_layers(model)[0]
    assert torch.equal(joined.experts.down_proj, torch.cat([mine.experts.down_proj, own.experts.down_proj]))
    assert torch.equal(joined.router.weight, torch.cat([mine.router.weight, own.router.weight]))
    torch.testing.assert_close(joined.shared.down_proj, shared, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.lm_head.weight, head, rtol=0, atol=1e-12)
    assert model.config.moe["experts"]["copies"] == 8
    fresh = mixture(2, **model.config.moe)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits), "the configuration fits"


def test_null_experts_stay_behind():
    router = {"kind": "top_k", "k": 2, "null_experts": 1, "bias": "scores", "init_std": 1.0}
    model = mixture(router=router)
    row = moe_layers(model)[0].router.weight[4].clone()
    join_experts(model, mixture(1, router=router))
    joined: Any = moe_layers(model)[0].router
    assert joined.num_experts == 9 == len(joined.bias) and torch.equal(joined.weight[8], row)
    model(input_ids=IDS)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match=r"the MoE layers are \[0, 1\] and \[1\]"):
        join_experts(mixture(), mixture(placement=[1]))
    hashed = {"router": {"kind": "hash", "k": 1}}
    with pytest.raises(UserError, match="layer 0: HashRouter has no row for each expert"):
        join_experts(mixture(**hashed), mixture(**hashed))
    latent = {"experts": {"kind": "latent_space", "copies": 2}}
    with pytest.raises(UserError, match="layer 0: LatentExperts share two matrices"):
        join_experts(mixture(**latent), mixture(**latent))
