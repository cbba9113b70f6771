import torch
from torch import nn
from torch.testing import assert_close

from unimoe.applications.recommendation.layers import Bank, BatchNorm, FeatureGate, Gate, mix


def test_batch_norm_is_that_of_torch():
    ours, theirs = BatchNorm((2, 3)).double(), nn.BatchNorm1d(6).double()
    x_BEH = torch.randn(7, 2, 3, dtype=torch.float64)
    for _ in range(3):
        assert_close(ours(x_BEH).flatten(1), theirs(x_BEH.flatten(1)), rtol=0, atol=1e-9)
    for name in ("running_mean", "running_var"):
        assert_close(getattr(ours, name).flatten(), getattr(theirs, name), rtol=0, atol=1e-9)
    ours.eval(), theirs.eval()
    assert_close(ours(x_BEH).flatten(1), theirs(x_BEH.flatten(1)), rtol=0, atol=1e-9)


def test_a_bank_is_its_experts_one_by_one():
    bank = Bank(3, inputs=4, width=5, depth=2)
    x_BD = torch.randn(6, 4)
    for expert, y_BH in enumerate(bank(x_BD).unbind(1)):
        one = x_BD
        for weight, bias in zip(bank.weights, bank.biases, strict=True):
            one = (one @ weight[expert] + bias[expert]).relu()
        assert_close(y_BH, one)
    assert_close(bank(x_BD[:, None].expand(-1, 3, -1)), bank(x_BD))


def test_a_gate_is_a_softmax_over_what_is_seen():
    gate = Gate([[True, False, True], [False, True, False]], inputs=4, sigmoid=True)
    x_BCG = torch.randn(5, 2, 4)
    weight_BCE = gate(x_BCG)
    wanted_BE = (x_BCG[:, 0] @ gate.weight[:2].T).softmax(dim=-1)
    assert_close(weight_BCE[:, 0, [0, 2]], wanted_BE)
    assert not weight_BCE[:, 0, 1].any() and not weight_BCE[:, 1, [0, 2]].any()
    assert_close(weight_BCE[:, 1, 1], (x_BCG[:, 1] @ gate.weight[2]).sigmoid())
    assert_close(Gate([[False, True]], 4)(x_BCG[:, :1])[:, 0, 1], torch.ones(5))
    y_BEH = torch.randn(5, 3, 2)
    assert_close(mix(weight_BCE, y_BEH)[:, 1], weight_BCE[:, 1, 1:2] * y_BEH[:, 1])


def test_the_feature_gate_starts_as_the_identity():
    gate, x_BND = FeatureGate(readers=2, inputs=6), torch.randn(5, 2, 6)
    assert gate(x_BND).equal(x_BND)
    nn.init.normal_(gate.b)
    mixed = torch.zeros_like(x_BND)
    for reader in range(2):
        x_BD = x_BND[:, reader]
        share_BJ = (x_BD @ gate.mix[reader]).softmax(dim=-1)
        for j in range(2):
            mixed[:, reader] += share_BJ[:, j : j + 1] * (x_BD @ gate.a[reader, j] @ gate.b[reader, j])
    assert_close(gate(x_BND), x_BND * 2 * mixed.sigmoid())
