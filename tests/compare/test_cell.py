"""One cell: its learning rates, a loss that is not finite, and the estimate of its time."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from unimoe.compare import cell, run
from unimoe.compare.base import open_base
from unimoe.compare.text import Texts
from unimoe.moe.routers.base import Router


@pytest.fixture
def made(small):
    """Settings, the design of plain upcycling, its model and the data."""
    config = small(match="none", router_lr=0.5, weight_decay=0.1, schedule="constant", warmup=0.0)
    base = open_base(config)
    copies = run.read_designs([], "all")[1]
    return config, copies, base.build(copies, 0), Texts(config, base)


def test_routers_have_their_own_rate_and_vectors_no_decay(made):
    config, copies, model, _ = made
    module = cell.CellModule(model, copies, config, 0)
    module.scheduled = lambda optimizer: optimizer  # the schedule asks the trainer for the steps
    groups = module.configure_optimizers().param_groups
    found = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    routers = {id(one) for part in model.modules() if isinstance(part, Router) for one in part.parameters()}
    trained = [one for one in model.parameters() if one.requires_grad]
    assert routers and len(found) == len(trained)
    for one in trained:
        decay = 0.1 if one.ndim > 1 else 0.0
        assert found[id(one)] == pytest.approx((0.5 if id(one) in routers else config.lr, decay))


def test_a_loss_that_is_not_finite_fails_the_cell_alone(made):
    config, copies, model, data = made
    with torch.no_grad():
        next(one for one in model.parameters() if one.requires_grad).fill_(torch.nan)
    found = cell.train_cell(model, copies, config, data, 0)
    assert found["failed"] == "the loss on prose is nan after step 0"
    assert "losses" not in found and "cost" not in found


def test_the_estimate_counts_steps_and_evaluations(made, monkeypatch):
    config, copies, model, data = made
    ticks = count()
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))  # every measured span takes one second
    monkeypatch.setattr(cell, "time", clock)
    config = replace(config, steps=12, val_every=4)
    held = {split: sum(map(len, data.evaluation(split).values())) for split in ("val", "test")}
    checks = {"val": 2, "test": 2}
    checks[config.watched] += 2  # after steps 4 and 8
    expected = 12 * (1 / 3 + 1) + sum(checks[split] * held[split] for split in held)
    assert cell.estimate_seconds(model, copies, config, data, 0) == pytest.approx(expected)
