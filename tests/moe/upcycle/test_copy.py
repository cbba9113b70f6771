import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.moe import (
    MoELayer,
    TopK,
    copy_experts,
    from_dense,
)

H, I = 32, 48  # noqa: E741


def mlp(inner=I, **kw) -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=inner, **kw))


@pytest.mark.parametrize("gating", ["topk_softmax", "softmax_topk"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_copies_are_exact_under_any_router_whose_weights_sum_to_one(gating, k):
    dense, x = mlp().double(), torch.randn(50, H, dtype=torch.float64)
    experts: Any = copy_experts(dense, 4)
    for std in (0.02, 5.0):
        moe: Any = MoELayer(TopK(H, 4, k, gating, renormalize=True, init_std=std), experts)
        torch.testing.assert_close(moe(x), dense(x), rtol=0, atol=1e-9)


def test_copies_own_their_memory():
    dense = mlp()
    experts: Any = copy_experts(dense, 2)
    with torch.no_grad():
        experts.down_proj[0] += 1
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])
    assert torch.equal(experts.down_proj[1], dense.down_proj.weight)


def test_different_dense_models_become_different_experts():
    mlps = [mlp() for _ in range(3)]
    experts: Any = from_dense(mlps)
    for slot, dense in enumerate(mlps):
        moe: Any = MoELayer(TopK(H, 3, 1), experts)
        with torch.no_grad():
            moe.router.weight.zero_()
            moe.router.weight[slot] = 1.0
        x = torch.rand(5, H)
        torch.testing.assert_close(moe(x), dense(x))


def test_noise_makes_copies_differ():
    experts: Any = copy_experts(mlp(), 3, noise=0.1)
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])
    deviation = (experts.down_proj[0] - experts.down_proj[1]).std() / experts.down_proj.std()
    assert 0.1 < deviation < 0.2


def test_meta_device_gives_the_structure():
    with torch.device("meta"):
        experts: Any = copy_experts(mlp(), 4)
    assert experts.gate_up_proj.shape == (4, 2 * I, H) and experts.gate_up_proj.is_meta


def test_a_llama_in_four_copies_is_the_llama_and_is_the_mixtral():
    """Every layer upcycled: logits of the dense model, and of Mixtral with the very same weights."""
    shape = {
        "vocab_size": 64, "hidden_size": H, "intermediate_size": I, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    dense: Any = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    sparse: Any = copy.deepcopy(dense)
    for layer in sparse.model.layers:
        layer.mlp = MoELayer(TopK(H, 4, 2, init_std=0.5), copy_experts(layer.mlp, 4))
    ids = torch.randint(0, 64, (2, 20))
    assert (sparse(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max() < 1e-4

    # experts that differ, so that Mixtral's routing has to agree as well
    with torch.no_grad():
        for layer in sparse.model.layers:
            layer.mlp.experts.down_proj += 0.05 * torch.randn_like(layer.mlp.experts.down_proj)
    rope = dense.config.rope_parameters
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            **shape, num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope, sliding_window=None
        )
    ).eval()
    state = {name.replace(".mlp.router.", ".mlp.gate."): value for name, value in sparse.state_dict().items()}
    mixtral.load_state_dict(state)
    difference = (mixtral(input_ids=ids).logits - sparse(input_ids=ids).logits).abs().max()
    assert difference < 1e-4
    assert (sparse(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max() > 1e-3
