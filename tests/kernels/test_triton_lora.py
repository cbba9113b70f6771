"""The Triton form of experts with adapters in the interpreter, on a CPU; test_triton.py runs this file."""

import os

import pytest
import torch

from unimoe.kernels.arguments import gather_and_sum
from unimoe.kernels.lora import Adapters, fused_lora_experts, lora_experts_reference

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py"),
    pytest.mark.usefixtures("triton_form"),
]
H, I, R = 12, 10, 3  # noqa: E741


@pytest.mark.parametrize("tokens, act, frozen", [(None, "silu", True), (3, "gelu_tanh", False)])
def test_equals_the_reference_with_every_gradient(tokens, act, frozen):
    """The last rows belong to no expert; a frozen base is no leaf."""
    counts, tail = [3, 0, 1], 1
    E, N = len(counts), sum(counts) + tail
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    shapes = [(E, 2 * I, H), (E, H, I), (E, R, H), (E, 2 * I, R), (E, R, I), (E, H, R), (N,)]
    x, gate_up, down, *stacks, weight = (torch.randn(shape) / 2 for shape in [(tokens or N, H), *shapes])
    base = [] if frozen else [gate_up, down]
    leaves = [one.requires_grad_() for one in (x, *base, *stacks, weight)]
    token = None if tokens is None else torch.randint(tokens, (N,))
    adapters = Adapters(*stacks)
    ours = fused_lora_experts(x, offsets, gate_up, down, adapters, 0.5, weight, token, act)

    def rows(x, *rest):
        return lora_experts_reference(x, *rest, adapters=adapters, scale=0.5, weight_N=weight, act=act)

    expected = gather_and_sum(rows, x, token, offsets, gate_up, down)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(y, leaves, dy) for y in (ours, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
