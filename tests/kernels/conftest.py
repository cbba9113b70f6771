import pytest
import torch

from unimoe.kernels import native
from unimoe.kernels.packed import Stack, quantize_rtn


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


def error(found, expected):
    return (found - expected).abs().max() / expected.abs().max()
