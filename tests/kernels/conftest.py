import pytest
import torch

from unimoe.kernels import native
from unimoe.kernels.arguments import groups
from unimoe.kernels.packed import Stack, linear_reference, quantize_rtn
from unimoe.kernels.swiglu import GATES


@pytest.fixture
def operators(built):
    """The compiled operators."""
    if native.ops() is None:
        pytest.skip("UNIMOE_NATIVE is 0, or the library does not load")


@pytest.fixture
def triton_form(monkeypatch):
    """Every operation runs in its Triton form, in tiles that are small enough for the interpreter."""
    from unimoe.kernels import triton_swiglu
    from unimoe.kernels.triton_grouped import Tile

    small = triton_swiglu.Tiles(*(Tile(16, 16, 16, 1, 1) for _ in range(3)))
    monkeypatch.setattr(triton_swiglu, "TILES", {(None, 4): small, (None, 2): small})
    monkeypatch.setenv("UNIMOE_KERNELS", "triton")


@pytest.fixture(params=["python", "native"])
def loop(request, monkeypatch):
    """The cpu form with its loop in Python and in C++."""
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    if request.param == "python":
        monkeypatch.setattr(native, "ops", lambda: None)
    else:
        request.getfixturevalue("operators")
    return request.param


def stack_of(*weights, bits, group, nested=False, halves=1):
    """A stack, filled with random bytes before it is filled."""
    stack = Stack.empty(bits, *weights[0].shape, group, nested, halves)
    stack.codes.random_(generator=torch.Generator().manual_seed(0))
    for e, weight in enumerate(weights):
        stack.fill(e, *quantize_rtn(weight, bits[e], group))
    return stack


def packed_reference(x_TH, token_N, offsets_E1, weight_N, gate_up, down, act="silu"):
    """``packed.fused_experts`` with activations of 8 bits, as the operators round them."""
    y_TH = torch.zeros_like(x_TH)
    for e, start, end in groups(offsets_E1.tolist()):
        gate, up = linear_reference(x_TH[token_N[start:end]], gate_up, e).chunk(2, -1)
        y = linear_reference(GATES[act](gate) * up, down, e) * weight_N[start:end, None]
        y_TH.index_add_(0, token_N[start:end], y)
    return y_TH


def error(found, expected):
    return (found - expected).abs().max() / expected.abs().max()
