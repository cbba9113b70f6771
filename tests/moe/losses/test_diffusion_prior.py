import math

import pytest
import torch
from torch.testing import assert_close

from unimoe.errors import UserError
from unimoe.moe import ConditionRouter, Context, LayerRecord, diffusion_prior
from unimoe.moe.losses import diffusion_prior as subject


def test_the_prior_moves_from_the_first_to_the_last_columns():
    layers, experts, k = 4, 3, 2
    prior = subject.step_prior(torch.linspace(0, 1, 1000), layers * k, layers * experts, alpha=4.0)
    assert (prior.sum(dim=1) == layers * k).all()
    assert prior[0, : layers * k].all() and prior[-1, -layers * k :].all()
    assert prior.all(dim=0).sum() == layers * (2 * k - experts), "columns that are always on"
    none = subject.step_prior(torch.linspace(0, 1, 1000), 2, 8, alpha=4.0)
    assert not none.all(dim=0).any()


def test_the_divergence_is_between_0_and_log_2():
    p, q = torch.tensor([[0.5, 0.5, 0, 0]]), torch.tensor([[0, 0, 0.5, 0.5]])
    assert subject.jensen_shannon(p, p) == pytest.approx(0, abs=1e-6)
    assert subject.jensen_shannon(p, q) == pytest.approx(math.log(2), abs=1e-4)
    assert 0 < subject.jensen_shannon(p, (p + q) / 2) < math.log(2)


def records(routers, cond_BC, time_B) -> list[LayerRecord]:
    of = torch.arange(len(time_B)).repeat_interleave(3)
    ctx = Context(sample_T=of, cond_BC=cond_BC, time_B=time_B)
    x_TD = torch.randn(len(of), 4)
    return [LayerRecord(index, router(x_TD, ctx), ctx) for index, router in enumerate(routers)]


def test_the_order_of_experts_and_layers_does_not_matter():
    torch.manual_seed(0)
    routers = [ConditionRouter(4, 3, k=2, init_std=1.0) for _ in range(2)]
    cond_BC, time_B = torch.randn(64, 4), torch.rand(64)
    one = diffusion_prior(records(routers, cond_BC, time_B), {})
    assert 0 < one < math.log(2)
    one.backward()
    assert all(router.weight.grad.any() for router in routers)
    with torch.no_grad():
        for parameter in routers[0].parameters():
            parameter.copy_(parameter[[2, 0, 1]].clone())
    assert_close(diffusion_prior(records(routers[::-1], cond_BC, time_B), {}).detach(), one.detach())


def test_a_router_that_follows_the_prior_loses_little():
    """One layer of two experts of which one is visited: the first up to some time, then the second."""
    router, time_B = ConditionRouter(1, 2, k=1), torch.linspace(0, 1, 50)
    late_B = (time_B**4).round()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[-1.0], [1.0]]))
    cond_BC = torch.where(late_B > 0, 50.0, -50.0)[:, None]
    wrong = records([router], torch.zeros(50, 1), time_B)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([20.0, -20.0]))  # silu(-50) is 0, silu(50) is 50
    assert diffusion_prior(records([router], cond_BC, time_B), {}) < 1e-3 < diffusion_prior(wrong, {})


def test_it_needs_times():
    ctx = Context(sample_T=torch.tensor([0]), cond_BC=torch.randn(1, 4))
    entry = LayerRecord(0, ConditionRouter(4, 3)(torch.randn(1, 4), ctx), ctx)
    with pytest.raises(UserError, match="gives each sample a time"):
        diffusion_prior([entry], {})
