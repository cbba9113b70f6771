import pytest
import torch

from unimoe.moe import sparse_mixer


def test_mixer_weights_and_gradients():
    """One slot: the weight is o or o/3, its gradient slope * o (1[i = drawn] - gates)."""
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.97, 1.2]).repeat(4000, 1).requires_grad_()
    weights = sparse_mixer(logits, torch.ones(4000, dtype=torch.long), 0.01, 1 / 4, 2.0)
    gates = torch.tensor([2.0, 1.97]).softmax(0)  # 1.2 is further than 2 % below the best
    drawn = (weights > 0).long()
    assert drawn.sum(1).eq(1).all() and drawn[:, 2].sum() == 0
    assert drawn[:, 0].float().mean().item() == pytest.approx(gates[0].item(), abs=0.03)
    second = weights[drawn[:, 1] == 1][:, 1]
    whole = torch.isclose(second, gates[1])
    assert torch.isclose(second[~whole], gates[1] / 3).all()
    assert whole.float().mean().item() == pytest.approx(1 / 4, abs=0.03)
    assert torch.isclose(weights[drawn[:, 0] == 1][:, 0], gates[0]).all()
    factor = torch.randn(4000)
    (weights.sum(1) * factor).sum().backward()
    jacobian = torch.diag(gates) - gates[:, None] * gates
    expected = 2.0 * factor[:, None] * jacobian[drawn.argmax(1)]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, :2], expected, rtol=1e-4, atol=1e-6)
    assert logits.grad[:, 2].count_nonzero() == 0
