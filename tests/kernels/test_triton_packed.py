"""The products of packed weights in Triton's interpreter; test_triton.py runs this file."""

import os

import pytest
import torch

from .conftest import error, packed_reference, stack_of

pytest.importorskip("triton")

from unimoe.kernels import packed, triton_packed

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py")


@pytest.mark.parametrize(
    "bits, nested, level",
    [(1, False, 0), (2, False, 0), (3, False, 0), (4, False, 0), (8, False, 0), (4, True, 0), (4, True, 3)]
    + [(8, True, 0), (8, True, 4), (8, True, 7)],
)
def test_linear_equals_the_reference(bits, nested, level):
    stack, bias = stack_of(torch.randn(33, 72), bits=[bits], group=36, nested=nested), torch.randn(33)
    x = torch.randn(1, 3, 72)
    expected = packed.linear_reference(x[0], stack, 0, level) + bias
    assert error(triton_packed.packed_linear(x, stack, bias, level)[0], expected) < 1e-6


@pytest.mark.parametrize("counts", [[5, 0, 2, 1, 3], [0, 0, 20, 0, 0]])
def test_experts_of_mixed_bits_equal_the_reference(counts):
    T, H, I, bits, group = 4, 32, 24, [4, 2, 8, 3, 1], 8  # noqa: E741
    gate_up = stack_of(*torch.randn(5, 2 * I, H) * 0.2, bits=bits, group=group, halves=2)
    down = stack_of(*torch.randn(5, H, I) * 0.2, bits=bits, group=group)
    N = sum(counts)
    offsets_E1 = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    pairs = (torch.randn(T, H), torch.randint(0, T, (N,)), offsets_E1, torch.rand(N), gate_up, down)
    # an activation at the edge of two codes may be rounded to the other one
    assert error(triton_packed.packed_experts(*pairs), packed_reference(*pairs)) < 2e-3


def test_rows_of_nobody_give_zeros():
    stack = stack_of(torch.randn(16, 32), torch.randn(16, 32), bits=[4, 8], group=32)
    y = triton_packed.product(torch.randn(5, 32), None, torch.tensor([0, 1, 3]), stack)
    assert y[3:].count_nonzero() == 0 and (y[:3].count_nonzero(1) == 16).all()


def test_the_dispatcher_gets_here(monkeypatch):
    stack, x = stack_of(torch.randn(16, 32), bits=[4], group=32), torch.randn(2, 32)
    monkeypatch.setenv("UNIMOE_KERNELS", "triton")
    monkeypatch.setattr(packed, "runs_native", lambda *_: False)
    assert torch.equal(packed.linear(x, stack), triton_packed.packed_linear(x, stack))
