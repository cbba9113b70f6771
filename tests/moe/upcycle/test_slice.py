from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import (
    MoELayer,
    Routing,
    TopK,
    from_dense,
    repeat_router,
    slice_experts,
    slice_ffn,
    split_experts,
)
from unimoe.moe.upcycle.slice import leading_slices

H, I = 32, 48  # noqa: E741


def mlp(inner=I, **kw) -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=inner, **kw))


def ffn(act: nn.Module | None = None, bias: bool = True) -> Any:
    """As a detection transformer has it; in float64, so that rounding hides nothing."""
    layers = {"fc1": nn.Linear(H, I, bias=bias), "fc2": nn.Linear(I, H, bias=bias), "act": act or nn.ReLU()}
    module: Any = nn.ModuleDict(layers).double()
    module.forward = lambda x: module.fc2(module.act(module.fc1(x)))
    module.fc1, module.fc2, module.act = (module[name] for name in layers)
    return module


@pytest.mark.parametrize("combine, exact", [("indicator", 1), ("straight_through", 1), ("weight", 0)])
def test_slices_of_one_ffn_summed_unweighted_are_exact(combine, exact):
    dense, x = mlp().double(), torch.randn(50, H, dtype=torch.float64)
    experts: Any = slice_experts(dense, 4)
    assert experts.intermediate_size == I // 4
    moe: Any = MoELayer(TopK(H, 4, 4, init_std=1.0), experts, combine=combine)
    assert torch.allclose(moe(x), dense(x), rtol=0, atol=1e-9) == bool(exact)


@pytest.mark.parametrize("combine", ["indicator", "straight_through", "k_weight"])
def test_exact_repeated_router_picks_all_slices_of_one_copy(combine):
    dense, x = mlp().double(), torch.randn(50, H, dtype=torch.float64)
    router = TopK(H, 8, 2, init_std=1.0)
    moe: Any = MoELayer(router, slice_experts(dense, 2, copies=4), combine=combine)
    assert not torch.allclose(moe(x), dense(x), atol=1e-3)
    repeat_router(router, 2)
    torch.testing.assert_close(moe(x), dense(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("combine", ["indicator", "straight_through", "k_weight"])
@pytest.mark.parametrize("slices, copies", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("dense", [ffn(), ffn(nn.GELU()), ffn(bias=False)])
def test_sliced_ffns_with_biases_are_exact(dense, slices, copies, combine):
    router = TopK(H, slices * copies, slices, init_std=1.0)
    repeat_router(router, slices)
    experts: Any = slice_ffn(dense, slices, copies)
    assert experts.up_proj.shape == (slices * copies, I // slices, H)
    x = torch.randn(50, H, dtype=torch.float64)
    torch.testing.assert_close(MoELayer(router, experts, combine)(x), dense(x), rtol=0, atol=1e-9)


def test_a_slice_has_its_share_of_the_last_bias():
    dense = ffn()
    experts: Any = slice_ffn(dense, 4, copies=2)
    torch.testing.assert_close(experts.down_bias, (dense.fc2.bias / 4).expand(8, -1))
    noisy: Any = slice_ffn(dense, 4, noise=0.1)
    assert not torch.equal(noisy.up_proj[0], experts.up_proj[0])


def test_specialists_split_in_more_experts():
    """4 specialists, 2 slices: the two slices of one are that one (UniMoE-Audio)."""
    dense, x = [mlp() for _ in range(4)], torch.randn(9, H)
    experts: Any = split_experts(dense, 2)
    assert (experts.num_experts, experts.intermediate_size) == (8, I // 2)
    for model, one in enumerate(dense):
        slices = torch.tensor([2 * model, 2 * model + 1]).repeat(9, 1)
        routing = Routing.from_topk(slices, torch.ones(9, 2), torch.zeros(9, 8), torch.zeros(9, 8), 8)
        torch.testing.assert_close(experts(x, routing, routing.weight_N), one(x), rtol=0, atol=2e-6)


def test_shared_experts_start_as_the_first_slices():
    dense = mlp()
    shared = leading_slices(dense, 2, 6)
    assert torch.equal(shared.down_proj[1], dense.down_proj.weight[:, 6:12])
    assert torch.equal(
        shared.gate_up_proj[1], torch.cat([dense.gate_proj.weight[6:12], dense.up_proj.weight[6:12]])
    )
    with pytest.raises(UserError, match="2 shared experts of width 30 need more than the FFN's 48"):
        leading_slices(dense, 2, 30)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match=r"expert 1 has down_proj \[32, 40\], expected \[32, 48\]"):
        from_dense([mlp(), mlp(40)])
    with pytest.raises(UserError, match="at least one"):
        from_dense([])
    with pytest.raises(UserError, match="width 48 in 5 slices"):
        slice_experts(mlp(), 5)
    with pytest.raises(UserError, match="multiple of 3 slices"):
        repeat_router(TopK(H, 8, 2), 3)
