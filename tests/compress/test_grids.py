import pytest
import torch

from unimoe.compress.grids import dequantize, fitted_scale, rounded
from unimoe.kernels.packed import BITS, codes_of, quantize_rtn


@pytest.mark.parametrize("bits", BITS)
def test_codes_lie_on_the_grid_and_rounding_is_to_nearest(bits):
    w = torch.randn(6, 64)
    codes, scale = quantize_rtn(w, bits, 16)
    least, most = (-1, 1) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    assert codes.dtype == torch.int8 and scale.shape == (6, 4)
    assert codes.min() >= least and codes.max() <= most
    if bits > 1:
        inside = (codes != most) | (
            w / scale.repeat_interleave(16, 1) <= most + 0.5
        )  # the end may be cut off
        error = (dequantize(codes, scale) - w).abs()
        assert (error[inside] <= scale.abs().repeat_interleave(16, 1)[inside] / 2 * 1.001).all()
    else:
        assert set(codes.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize("bits", BITS)
def test_weights_on_the_grid_stay_as_they_are(bits):
    once = rounded(torch.randn(4, 32), bits, 16)
    torch.testing.assert_close(rounded(once, bits, 16), once, rtol=1e-3, atol=1e-6)  # scales are float16


def test_more_bits_err_less():
    w = torch.randn(16, 128)
    errors = [(rounded(w, bits, 32) - w).norm().item() for bits in (2, 3, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", BITS)
def test_a_fitted_scale_is_never_worse_than_the_spanning_one(bits):
    w = torch.randn(32, 64)
    scale = fitted_scale(w, bits)
    fitted = (codes_of(w, scale, bits) * scale - w).square().sum(1)
    assert (fitted <= (rounded(w, bits, 64) - w).square().sum(1) * 1.001).all()


def test_a_group_of_zeros_stays_zero():
    assert rounded(torch.zeros(2, 32), 4, 16).eq(0).all()
