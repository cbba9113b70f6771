import pytest
import torch

from unimoe.errors import UserError
from unimoe.kernels import native, packed_torch
from unimoe.kernels.packed import quantize_rtn
from unimoe.moe import FFNExperts, MoELayer, TopK
from unimoe.moe.experts.packed_ffn import PackedFFNExperts
from unimoe.moe.packed_linear import packed_weights


def layer(act="relu"):
    torch.manual_seed(0)
    experts = FFNExperts(4, 32, 48, act)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return MoELayer(TopK(32, 4, 2, init_std=0.5), experts).eval()


@torch.no_grad()
@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), ([8, 4, 8, 4], 0.2)])
def test_outputs_are_those_of_the_floats_within_the_rounding(bits, most):
    moe, x = layer("gelu"), torch.randn(9, 32)
    exact = moe(x)
    moe.experts = PackedFFNExperts.from_experts(moe.experts, bits, 16)
    assert 0 < (moe(x) - exact).abs().max() / exact.abs().max() < most
    assert packed_weights(moe) == 2 * 4 * 32 * 48


@torch.no_grad()
def test_without_the_operators_weights_are_converted_once(monkeypatch):
    monkeypatch.setattr(native, "ops", lambda: None)
    converted, convert = [], packed_torch._convert
    monkeypatch.setattr(packed_torch, "_convert", lambda *one: converted.append(one) or convert(*one))
    experts, x = FFNExperts(2, 32, 64, "gelu"), torch.randn(3, 32)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    moe = MoELayer(TopK(32, 2, 2, init_std=0.5), experts).eval()
    exact = moe(x)
    moe.experts = PackedFFNExperts.from_experts(experts, 8, 32)
    first = moe(x)
    assert 0 < (first - exact).abs().max() / exact.abs().max() < 0.05
    assert torch.equal(moe(x), first) and len(converted) == 2 * 2  # both matrices of both experts


@torch.no_grad()
def test_codes_from_elsewhere_and_the_meta_device():
    experts = layer().experts
    codes = tuple(
        tuple(map(torch.stack, zip(*(quantize_rtn(one, 4, 16) for one in stack), strict=True)))
        for stack in (experts.up_proj, experts.down_proj)
    )
    given = PackedFFNExperts.from_experts(experts, 4, 16, codes).state_dict()
    for name, one in PackedFFNExperts.from_experts(experts, 4, 16).state_dict().items():
        assert torch.equal(given[name], one)
    empty = PackedFFNExperts.from_experts(experts.to("meta"), 4, 16).state_dict()
    assert {name: one.shape for name, one in empty.items()} == {n: one.shape for n, one in given.items()}
    with pytest.raises(UserError, match="the group 20 does not divide the width 32"):
        PackedFFNExperts.from_experts(layer().experts, 4, 20)
    with pytest.raises(UserError, match="got bits for 3 experts, expected 4"):
        PackedFFNExperts.from_experts(layer().experts, [4, 4, 8], 16)
