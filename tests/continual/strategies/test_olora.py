import pytest
import torch

from unimoe.continual.strategies.olora import OLoRA
from unimoe.errors import UserError


def test_the_penalty_is_the_overlap_with_all_earlier_adapters(attach):
    strategy = attach(OLoRA(orthogonality=0.25), banks=3)
    expected = 0.0
    for layer in strategy.learner.layers.values():
        first, second, new = layer.lora_banks
        expected += sum((new.A @ old.A.T).abs().sum().item() for old in (first, second))
    assert strategy.penalty().item() == pytest.approx(0.25 * expected, rel=1e-5)
    strategy.penalty().backward()
    for layer in strategy.learner.layers.values():
        assert layer.lora_banks[0].A.grad is None and layer.lora_banks[2].A.grad is not None


def test_nothing_overlaps_on_the_first_task(attach):
    strategy = attach(OLoRA())
    assert strategy.penalty().item() == 0
    torch.testing.assert_close(strategy.overlap(), torch.zeros(()))
    with pytest.raises(UserError, match="at least 0"):
        OLoRA(orthogonality=-1.0)
