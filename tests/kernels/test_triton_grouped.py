"""Grouped products in Triton's interpreter; test_triton.py runs this file."""

import os

import pytest
import torch

pytest.importorskip("triton")

from unimoe.kernels.triton_grouped import Tile, rows_times_weights

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py")


def test_offsets_past_two_to_the_31():
    """Rows so far out that row * columns overflows 32 bits; of the memory only a few pages are touched."""
    far, wide = 2**21 + 5, 1024
    a = torch.empty(far + 1, wide, dtype=torch.float16)
    weights, a[far] = torch.randn(1, wide, 16).half(), torch.randn(wide).half()
    token, tiles = torch.tensor([far]), torch.tensor([[0], [0], [1]], dtype=torch.int32)
    y = rows_times_weights(a, token, weights, tiles, Tile(16, 16, 1024, 1, 1))
    torch.testing.assert_close(y[0].float(), a[far].float() @ weights[0].float(), rtol=1e-2, atol=1e-2)
