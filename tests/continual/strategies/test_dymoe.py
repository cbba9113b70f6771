import pytest
import torch

from unimoe.continual.guidance import GuidanceConfig
from unimoe.continual.strategies.dymoe import DyMoE, IncMoELoRA
from unimoe.moe import record


def trained(attach, strategy, banks):
    attach(strategy, banks)
    for layer in strategy.learner.layers.values():
        for bank in layer.lora_banks:
            torch.nn.init.normal_(bank.B, std=0.1)
    return strategy


def test_with_both_parts_off_it_is_incmoelora(attach, tasks):
    losses = []
    for kind, settings in ((IncMoELoRA, {}), (DyMoE, {"guidance": GuidanceConfig(False, exclusivity=0)})):
        torch.manual_seed(0)
        strategy = trained(attach, kind(temperature=0.1, **settings), 2)
        if kind is DyMoE:
            strategy.guide.config.specialization = 0.0
        strategy.before_training_exp(tasks[1])
        batch = strategy.learner.collate(tasks[1].samples)
        losses.append(strategy.loss(batch, 9, 10).item())
    assert losses[0] == losses[1]


def test_the_losses_of_the_guide_are_added(attach, tasks):
    strategy = trained(attach, DyMoE(temperature=0.1), 2)
    strategy.before_training_exp(tasks[1])
    batch = strategy.learner.collate(tasks[1].samples)
    early = strategy.loss(batch, 0, 10)
    with record() as records:
        late = strategy.loss(batch, 9, 10)
    routing, _ = strategy.guide.loss(records, 4, 4, 0.1)
    assert len(records) == len(strategy.learner.layers) * len(batch)
    assert (late - early).item() == pytest.approx(routing.item(), rel=1e-3) and routing > 0
    routing.backward()
    assert all(p.grad is not None for name, p in strategy.learner.trainable().items() if "rows" in name)


def test_guidance_ends_with_the_task(attach, tasks):
    strategy = trained(attach, DyMoE(), 2)
    strategy.before_training_exp(tasks[1])
    assert strategy.guide.guided
    strategy.after_training_exp(tasks[1])
    assert not strategy.guide.guided
    strategy.before_training_exp(tasks[0])
    assert not strategy.guide.guided  # there is nothing before the first task


def test_a_token_keeps_as_many_experts_as_a_bank_has(attach):
    for kept, settings in ((4, {}), (2, {"k": 2})):
        strategy = attach(IncMoELoRA(**settings), 3)
        assert {router.k for router in strategy.routers().values()} == {kept}
        assert {tuple(router.sizes) for router in strategy.routers().values()} == {(4, 4, 4)}
