import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.experts.packed_ffn import PackedFFNExperts

KINDS = {PackedExperts: 3, PackedFFNExperts: 2}
"""Kind -> matrices of an expert."""


@pytest.mark.parametrize(("kind", "matrices"), KINDS.items())
def test_weights_that_fill_both_stacks_come_out_of_them(kind, matrices):
    experts = kind(2, 32, 64, [8, 4], 16)
    assert experts.num_weights == matrices * 2 * 32 * 64
    weights = tuple(torch.randn(2, stack.rows, stack.width) for stack in experts.stacks())
    experts.fill(weights)
    for stack, floats in zip(experts.stacks(), weights, strict=True):
        for e, most in enumerate((0.02, 0.2)):
            assert 0 < (stack.dequantize(e) - floats[e]).abs().max() / floats[e].abs().max() < most
    codes = tuple(
        tuple(map(torch.stack, zip(*map(stack.unpack, range(2)), strict=True))) for stack in experts.stacks()
    )
    again = kind(2, 32, 64, [8, 4], 16)
    again.fill(weights, codes)
    for name, one in experts.state_dict().items():
        assert torch.equal(again.state_dict()[name], one)


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_needs_its_bits(kind):
    with pytest.raises(UserError, match="got bits for 3 experts, expected 4"):
        kind(4, 32, 64, [4, 4, 8], 16)
