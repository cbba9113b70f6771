"""Packed products where the operators in C++ are not built."""

import pytest
import torch

from unimoe.kernels import native, packed

from .conftest import error, packed_reference, stack_of


@pytest.mark.parametrize(
    "bits, nested, level", [(1, False, 0), (3, False, 0), (4, True, 2), (4, False, 0), (8, False, 0)]
)
def test_without_the_operators_torch_multiplies_in_bfloat16(bits, nested, level, monkeypatch):
    monkeypatch.setattr(native, "ops", lambda: None)
    stack, bias = stack_of(torch.randn(33, 128), bits=[bits], group=64, nested=nested), torch.randn(33)
    x = torch.randn(1, 5, 128)
    exact = x @ stack.dequantize(0, level).t() + bias
    found, again = packed.linear(x, stack, bias, level), packed.linear(x, stack, bias, level)
    assert torch.equal(found, again) and 1e-4 < error(found, exact) < 1e-2
    many = packed.linear(x.repeat(1, 4, 1), stack, bias, level)  # unpacked
    assert error(many[:, :5], exact) < 1e-5


@pytest.mark.parametrize("group", [32, 8])
def test_experts_without_the_operators(group, monkeypatch):
    monkeypatch.setattr(native, "ops", lambda: None)
    H, I, bits = 64, 32, [4, 8]  # noqa: E741
    gate_up = stack_of(*torch.randn(2, 2 * I, H) * 0.2, bits=bits, group=group, halves=2)
    down = stack_of(*torch.randn(2, H, I) * 0.2, bits=bits, group=group)
    pairs = (
        torch.randn(3, H),
        torch.tensor([0, 2, 1, 2]),
        torch.tensor([0, 2, 4]),
        torch.rand(4),
        gate_up,
        down,
    )
    found = packed.fused_experts(*pairs, torch.tensor(bits, dtype=torch.uint8))
    assert error(found, packed_reference(*pairs)) < 3e-2
