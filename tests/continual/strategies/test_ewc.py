import pytest
import torch

from unimoe.continual.strategies.ewc import EWC
from unimoe.errors import UserError
from unimoe.model.host_loss import answer_loss


def test_the_penalty_is_quadratic_in_the_change(attach, tasks):
    strategy = attach(EWC(strength=3.0, samples=2))
    assert float(strategy.penalty()) == 0
    strategy.after_training_exp(tasks[0])
    fisher = strategy.memory["fisher"]
    assert float(strategy.penalty()) == 0 and any(value.sum() > 0 for value in fisher.values())
    change = {name: torch.randn_like(p) for name, p in strategy.learner.adapters().items()}
    with torch.no_grad():
        for name, p in strategy.learner.adapters().items():
            p += change[name]
    expected = 1.5 * sum((fisher[name] * change[name] ** 2).sum() for name in fisher)
    torch.testing.assert_close(strategy.penalty(), expected, rtol=1e-4, atol=0)


def test_information_is_the_mean_squared_gradient_of_single_samples(attach, tasks):
    strategy = attach(EWC(samples=6))
    found = strategy.information(tasks[0])
    name, parameter = next((n, p) for n, p in strategy.learner.trainable().items() if n.endswith("B"))
    squares = []
    for sample in tasks[0].samples:
        (part,) = strategy.learner.collate([sample])
        loss, tokens = answer_loss(strategy.learner.model, [part])
        squares.append(torch.autograd.grad(loss * tokens, parameter)[0] ** 2)
    torch.testing.assert_close(found[name], torch.stack(squares).mean(0), rtol=1e-4, atol=1e-12)


def test_earlier_tasks_decay(attach, tasks):
    strategy = attach(EWC(samples=2, decay=0.5))
    strategy.after_training_exp(tasks[0])
    first = {name: value.clone() for name, value in strategy.memory["fisher"].items()}
    strategy.after_training_exp(tasks[0])
    for name, value in first.items():
        torch.testing.assert_close(strategy.memory["fisher"][name], 1.5 * value)


def test_settings():
    with pytest.raises(UserError, match="samples above 0"):
        EWC(samples=0)
