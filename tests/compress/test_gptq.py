import pytest
import torch

from unimoe.compress.gptq import gptq, inverse_factor
from unimoe.compress.grids import dequantize, fitted_scale, rounded
from unimoe.kernels.packed import codes_of


def correlated(rows, width):
    return torch.randn(rows, width // 4) @ torch.randn(width // 4, width) + 0.1 * torch.randn(rows, width)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_change_less_than_with_rounding(bits):
    x, w = correlated(256, 64), torch.randn(24, 64)
    codes, scale = gptq(w, x.t() @ x, bits, 16)
    half = 1 << (bits - 1)
    assert codes.dtype == torch.int8 and codes.min() >= -half and codes.max() < half

    def error(found):
        return (x @ (found - w).t()).norm()

    assert error(dequantize(codes, scale)) < 0.6 * error(rounded(w, bits, 16))


def test_it_is_the_published_recursion():
    """Column by column, the largest inputs first, with the explicit inverse, whose row and column are
    eliminated after each step."""
    x, w, group = correlated(64, 16), torch.randn(3, 16), 8
    codes, scale = gptq(w, x.t() @ x, 4, group, damping=0.01)
    hessian = (x.t() @ x).double()
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16))
    torch.testing.assert_close(scale, fitted_scale(w.unflatten(1, (2, group)), 4).squeeze(-1))
    w = w.double()
    for i in hessian.diagonal().argsort(descending=True):
        own = scale[:, i // group, None].double()
        code = codes_of(w[:, i, None], own, 4)
        assert torch.equal(code.squeeze(1), codes[:, i])
        error = (w[:, i] - (code * own).squeeze(1)) / inverse[i, i]
        w = w - torch.outer(error, inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]


def test_inputs_that_are_not_correlated_are_rounded_to_nearest():
    w = torch.randn(8, 32)
    codes, scale = gptq(w, torch.eye(32), 4, 16)
    torch.testing.assert_close(scale, fitted_scale(w.unflatten(1, (2, 16)), 4).squeeze(-1))
    assert torch.equal(codes, codes_of(w, scale, 4))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_hessian_of_few_rows_gives_finite_weights(rows):
    x, w = torch.randn(rows, 32), torch.randn(8, 32)
    x[:, 3] = 0  # never seen
    found = dequantize(*gptq(w, x.t() @ x, 4, 16))
    assert found.isfinite().all() and (found - w).abs().max() < 1.0


def test_a_hessian_that_cannot_be_inverted_is_damped_until_it_can():
    x = torch.randn(2, 16)
    upper = inverse_factor(x.t() @ x, damping=0.0)
    assert upper.isfinite().all() and upper.tril(-1).eq(0).all()


def test_a_hessian_of_nan_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)
