import pytest
import torch

from unimoe.compress.nested import nest


def test_more_planes_reuse_the_bytes_of_fewer():
    w = torch.randn(8, 64)
    small, large = nest(w, 2, 3, 16), nest(w, 2, 5, 16)
    assert torch.equal(small.codes_OK, large.codes_OK)
    assert torch.equal(small.sign_POK, large.sign_POK[:1])
    assert torch.equal(small.at(3), large.at(3)) and torch.equal(small.at(2), large.at(2))


@pytest.mark.parametrize("base", [1, 2, 5])
def test_each_bit_lowers_the_error(base):
    w = torch.randn(16, 128)
    nested = nest(w, base, base + 3, 32)
    errors = [(nested.at(bits) - w).norm().item() for bits in range(base, base + 4)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))


def test_each_plane_lies_halfway_by_the_mean_of_what_is_missing():
    w = torch.randn(4, 32)
    nested = nest(w, 2, 3, 32)
    missing = w - nested.at(2)
    torch.testing.assert_close(nested.scale_POG[0, :, 0], missing.abs().mean(1))
    assert torch.equal(nested.sign_POK[0], missing >= 0)


def test_errors_are_carried_into_later_groups():
    x = torch.randn(256, 16) @ torch.randn(16, 64) + 0.1 * torch.randn(256, 64)
    w = torch.randn(24, 64)
    plain, carried = nest(w, 2, 4, 16), nest(w, 2, 4, 16, x.t() @ x)
    errors = [(x @ (nested.at(4) - w).t()).norm() for nested in (carried, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_stored_bits_of_a_weight():
    """2 + 3 + 4 bits nested against three codes side by side (group 128, scales and zeros of 16 bits)."""
    nested = nest(torch.randn(2, 256), 2, 4, 128)
    assert nested.bits_per_weight() == 4 + 16 * 4 / 128
    apart = sum(bits + 2 * 16 / 128 for bits in (2, 3, 4))
    assert (nested.bits_per_weight(), apart) == (4.5, 9.75)
