import pytest
import torch

from unimoe.kernels import native
from unimoe.kernels.packed import Stack, quantise_rtn


@pytest.fixture(params=["python", "native"])
def loop(request, monkeypatch):
    """The cpu form with its loop in Python and in C++."""
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    if request.param == "python":
        monkeypatch.setattr(native, "ops", lambda: None)
    else:
        request.getfixturevalue("built")
        if native.ops() is None:
            pytest.skip("UNIMOE_NATIVE is 0, or the library does not load")
    return request.param


def stack_of(*weights, bits, group, nested=False, halves=1):
    """A stack, filled with random bytes before it is filled."""
    stack = Stack.empty(bits, *weights[0].shape, group, nested, halves)
    stack.codes.random_(generator=torch.Generator().manual_seed(0))
    for e, weight in enumerate(weights):
        stack.fill(e, *quantise_rtn(weight, bits[e], group))
    return stack


def error(found, expected):
    return (found - expected).abs().max() / expected.abs().max()
