import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from unimoe.errors import UserError
from unimoe.moe import (
    MoELayer,
    Routing,
    TopK,
    copy_experts,
    from_dense,
    read_ffn,
    read_swiglu,
    repeat_router,
    slice_experts,
    slice_ffn,
    split_experts,
)
from unimoe.moe.upcycle import leading_slices

H, I = 32, 48  # noqa: E741


def mlp(inner=I, **kw) -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=inner, **kw))


@pytest.mark.parametrize("gating", ["topk_softmax", "softmax_topk"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_copies_are_exact_under_any_router_whose_weights_sum_to_one(gating, k):
    dense, x = mlp(), torch.randn(50, H)
    experts: Any = copy_experts(dense, 4)
    assert experts.origin.exact and experts.origin.kind == "copy"
    for std in (0.02, 5.0):
        moe: Any = MoELayer(TopK(H, 4, k, gating, renormalize=True, init_std=std), experts)
        torch.testing.assert_close(moe(x), dense(x), rtol=0, atol=2e-6)


def test_copies_own_their_memory():
    dense = mlp()
    experts: Any = copy_experts(dense, 2)
    with torch.no_grad():
        experts.down_proj[0] += 1
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])
    assert torch.equal(experts.down_proj[1], dense.down_proj.weight)


@pytest.mark.parametrize("combine, exact", [("indicator", 1), ("straight_through", 1), ("weight", 0)])
def test_slices_of_one_ffn_summed_unweighted_are_exact(combine, exact):
    dense, x = mlp(), torch.randn(50, H)
    experts: Any = slice_experts(dense, 4)
    assert experts.intermediate_size == I // 4 and experts.origin.exact
    moe: Any = MoELayer(TopK(H, 4, 4, init_std=1.0), experts, combine=combine)
    assert torch.allclose(moe(x), dense(x), rtol=0, atol=2e-6) == bool(exact)


@pytest.mark.parametrize("combine", ["indicator", "straight_through", "k_weight"])
def test_repeated_router_picks_all_slices_of_one_copy(combine):
    dense, x = mlp(), torch.randn(50, H)
    router = TopK(H, 8, 2, init_std=1.0)
    moe: Any = MoELayer(router, slice_experts(dense, 2, copies=4), combine=combine)
    assert not torch.allclose(moe(x), dense(x), atol=1e-3)
    repeat_router(router, 2)
    torch.testing.assert_close(moe(x), dense(x), rtol=0, atol=2e-6)


def ffn(act: nn.Module | None = None, bias: bool = True) -> Any:
    """As a detection transformer has it; in float64, so that rounding hides nothing."""
    layers = {"fc1": nn.Linear(H, I, bias=bias), "fc2": nn.Linear(I, H, bias=bias), "act": act or nn.ReLU()}
    module: Any = nn.ModuleDict(layers).double()
    module.forward = lambda x: module.fc2(module.act(module.fc1(x)))
    module.fc1, module.fc2, module.act = (module[name] for name in layers)
    return module


@pytest.mark.parametrize("combine", ["indicator", "straight_through", "k_weight"])
@pytest.mark.parametrize("slices, copies", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("dense", [ffn(), ffn(nn.GELU()), ffn(bias=False)])
def test_sliced_ffns_with_biases_are_exact(dense, slices, copies, combine):
    router = TopK(H, slices * copies, slices, init_std=1.0)
    repeat_router(router, slices)
    experts: Any = slice_ffn(dense, slices, copies)
    assert experts.up_proj.shape == (slices * copies, I // slices, H) and experts.origin.exact
    x = torch.randn(50, H, dtype=torch.float64)
    torch.testing.assert_close(MoELayer(router, experts, combine)(x), dense(x), rtol=0, atol=1e-6)


def test_a_slice_has_its_share_of_the_last_bias():
    dense = ffn()
    experts: Any = slice_ffn(dense, 4, copies=2)
    torch.testing.assert_close(experts.down_bias, (dense.fc2.bias / 4).expand(8, -1))
    noisy: Any = slice_ffn(dense, 4, noise=0.1)
    assert not noisy.origin.exact and not torch.equal(noisy.up_proj[0], experts.up_proj[0])


def test_other_two_layer_ffns_are_refused():
    with pytest.raises(UserError, match="LlamaMLP is not a two-layer FFN: expected linear layers up_proj"):
        read_ffn(mlp())
    with pytest.raises(UserError, match="activation SiLU, expected ReLU or GELU"):
        read_ffn(ffn(nn.SiLU()))
    with pytest.raises(UserError, match="activation GELU, expected ReLU or GELU"):
        read_ffn(ffn(nn.GELU(approximate="tanh")))
    with pytest.raises(UserError, match="width 48 in 5 slices"):
        slice_ffn(ffn(), 5)


def test_different_dense_models_become_different_experts():
    mlps = [mlp() for _ in range(3)]
    experts: Any = from_dense(mlps)
    assert not experts.origin.exact
    alone: Any = from_dense(mlps[:1])
    assert alone.origin.exact
    for slot, dense in enumerate(mlps):
        moe: Any = MoELayer(TopK(H, 3, 1), experts)
        with torch.no_grad():
            moe.router.weight.zero_()
            moe.router.weight[slot] = 1.0
        x = torch.rand(5, H)
        torch.testing.assert_close(moe(x), dense(x))


def test_specialists_split_in_more_experts():
    """4 specialists, 2 slices: the two slices of one are that one (UniMoE-Audio)."""
    dense, x = [mlp() for _ in range(4)], torch.randn(9, H)
    experts: Any = split_experts(dense, 2)
    assert (experts.num_experts, experts.intermediate_size, experts.origin.exact) == (8, I // 2, False)
    for model, one in enumerate(dense):
        slices = torch.tensor([2 * model, 2 * model + 1]).repeat(9, 1)
        routing = Routing.from_topk(slices, torch.ones(9, 2), torch.zeros(9, 8), torch.zeros(9, 8), 8)
        torch.testing.assert_close(experts.mix(x, routing, routing.weight_N), one(x), rtol=0, atol=2e-6)


def test_shared_experts_start_as_the_first_slices():
    dense = mlp()
    shared = leading_slices(dense, 2, 6)
    assert torch.equal(shared.down_proj[1], dense.down_proj.weight[:, 6:12])
    assert torch.equal(
        shared.gate_up_proj[1], torch.cat([dense.gate_proj.weight[6:12], dense.up_proj.weight[6:12]])
    )
    with pytest.raises(UserError, match="2 shared experts of width 30 need more than the FFN's 48"):
        leading_slices(dense, 2, 30)


def test_noise_ends_exactness_and_says_so():
    experts: Any = copy_experts(mlp(), 3, noise=0.1)
    assert not experts.origin.exact and experts.origin.when == "noise was added"
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])
    deviation = (experts.down_proj[0] - experts.down_proj[1]).std() / experts.down_proj.std()
    assert 0.1 < deviation < 0.2


def test_fused_and_separate_layouts_are_read():
    dense = mlp()
    gate_up, down = read_swiglu(dense)
    torch.testing.assert_close(gate_up, torch.cat([dense.gate_proj.weight, dense.up_proj.weight]))
    fused = Phi3MLP(Phi3Config(hidden_size=H, intermediate_size=I))
    x = torch.randn(5, H)
    torch.testing.assert_close(MoELayer(TopK(H, 1, 1), copy_experts(fused, 1))(x), fused(x))


def test_meta_device_gives_the_structure():
    with torch.device("meta"):
        experts: Any = copy_experts(mlp(), 4)
    assert experts.gate_up_proj.shape == (4, 2 * I, H) and experts.gate_up_proj.is_meta


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Sequential(nn.Linear(2, 2)), "Sequential is not a SwiGLU FFN"),
        (mlp(mlp_bias=True), "has a bias"),
        (mlp(hidden_act="gelu"), "activation GELUActivation, expected SiLU"),
    ],
)
def test_other_ffns_are_refused_by_name(module, message):
    with pytest.raises(UserError, match=message):
        copy_experts(module, 2)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match=r"expert 1 has down_proj \[32, 40\], expected \[32, 48\]"):
        from_dense([mlp(), mlp(40)])
    with pytest.raises(UserError, match="at least one"):
        from_dense([])
    with pytest.raises(UserError, match="width 48 in 5 slices"):
        slice_experts(mlp(), 5)
    with pytest.raises(UserError, match="multiple of 3 slices"):
        repeat_router(TopK(H, 8, 2), 3)


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
