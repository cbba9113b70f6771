import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Context, LayerRecord, TopK, auxiliary_loss, load_balance, z_loss


def records():
    return [
        LayerRecord(layer, TopK(8, 4, 2, init_std=1.0)(torch.randn(6, 8), Context()), Context())
        for layer in (0, 2)
    ]


@pytest.mark.parametrize(("balance", "z"), [(0.01, 0.0), (0.0, 0.1), (0.5, 0.25)])
def test_coefficients_weigh_the_sums_over_layers(balance, z):
    both = records()
    found = auxiliary_loss({"balance": balance, "z": {"coef": z}}, both)
    torch.testing.assert_close(found, balance * load_balance(both).sum() + z * z_loss(both).sum())


def test_every_loss_is_that_of_the_global_batch():
    """Means are over the tokens of all ranks: twice the counts and twice the sums change nothing."""
    both = records()
    found = auxiliary_loss({"balance": 1.0, "z": 1.0}, both, across=lambda values: 2 * values)
    torch.testing.assert_close(found, load_balance(both).sum() + z_loss(both).sum())


def test_without_coefficients_it_is_zero():
    assert auxiliary_loss({"balance": 0.0}, records()) == 0


def test_an_unknown_loss():
    with pytest.raises(UserError, match="moe.losses: unknown 'zz', did you mean 'z'"):
        auxiliary_loss({"zz": 1.0}, records())
