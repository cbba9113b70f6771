"""The Triton form of FFN experts in Triton's interpreter, on a CPU; test_triton.py runs this file."""

import os

import pytest
import torch

from unimoe.kernels.arguments import gather_and_sum
from unimoe.kernels.ffn import ffn_experts_reference, fused_ffn_experts

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py"),
    pytest.mark.usefixtures("triton_form"),
]
H, I = 12, 10  # noqa: E741


@pytest.mark.parametrize("tokens, act", [(None, "relu"), (3, "gelu")])
def test_equals_the_reference_with_every_gradient(tokens, act):
    """The last row belongs to no expert, and its weight is not a number."""
    counts, tail = [3, 0, 1], 1
    E, N = len(counts), sum(counts) + tail
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    shapes = [(tokens or N, H), (E, I, H), (E, I), (E, H, I), (E, H), (N,)]
    x, *stacks, weight = (torch.randn(shape) for shape in shapes)
    weight[N - tail :] = torch.nan
    leaves = [one.requires_grad_() for one in (x, *stacks, weight)]
    token = None if tokens is None else torch.randint(tokens, (N,))
    ours = fused_ffn_experts(x, offsets, *stacks, act, weight, token)

    def rows(x, *rest):
        return ffn_experts_reference(x, *rest, act=act, weight_N=weight)

    expected = gather_and_sum(rows, x, token, offsets, *stacks)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    dy = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(y, leaves, dy) for y in (ours, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
