import pytest
import torch

from unimoe.moe import Context, ExpertLoad, LayerRecord, MoEConfig, TopK, auxiliary_loss, load_balance, z_loss


def records():
    return [
        LayerRecord(layer, TopK(8, 4, 2, init_std=1.0)(torch.randn(6, 8), Context()), Context())
        for layer in (0, 2)
    ]


@pytest.mark.parametrize(("balance", "z"), [(0.01, 0.0), (0.0, 0.1), (0.5, 0.25)])
def test_coefficients_weigh_the_sums_over_layers(balance, z):
    both = records()
    found = auxiliary_loss(MoEConfig(balance_coef=balance, z_coef=z), both)
    torch.testing.assert_close(found, balance * load_balance(both).sum() + z * z_loss(both).sum())


def test_the_load_of_a_global_batch_reaches_every_loss():
    both = records()
    load = ExpertLoad(torch.rand(2, 4), torch.tensor(12.0))  # twice as many tokens as here
    found = auxiliary_loss(MoEConfig(balance_coef=1.0, z_coef=1.0), both, load)
    torch.testing.assert_close(found, load_balance(both, load).sum() + z_loss(both).sum() / 2)


def test_without_coefficients_it_is_zero():
    assert auxiliary_loss(MoEConfig(balance_coef=0.0), records()) == 0
