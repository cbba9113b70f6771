from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch.nn import LayerNorm
from torch.testing import assert_close

from unimoe.applications.adaptation.network import MetaDMoE, NetworkConfig
from unimoe.errors import UserError


def make(design: str = "meta", expert_of: tuple[int, ...] = (0, 1, 2)) -> MetaDMoE:
    torch.manual_seed(0)
    config = NetworkConfig(design=design, channels=2, heads=2)  # type: ignore[arg-type]
    return MetaDMoE(config, 3, list(expert_of)).double()


IMAGES, LABELS = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3


def outer(model: MetaDMoE, rate: float = 0.5, domain: int = 1) -> torch.Tensor:
    weights = model.adapt(IMAGES[:3], rate, domain, differentiable=True)
    return F.cross_entropy(model.logits(IMAGES[3:], weights), LABELS[3:])


@pytest.mark.parametrize("domain", [-1, 0, 1, 2])
def test_exact_the_mask_leaves_out_the_expert_of_the_domain_alone(domain):
    """The knowledge changes with each expert but that one; of an unknown domain with all."""
    model = make(expert_of=(2, 0, 1))
    before = model.knowledge(IMAGES, domain)
    for place, expert in enumerate(model.experts):
        bias = cast(LayerNorm, expert.norm).bias
        with torch.no_grad():
            bias += torch.arange(len(bias)) / 10
            own = domain >= 0 and place == (2, 0, 1)[domain]
            assert model.knowledge(IMAGES, domain).equal(before) is own
            bias -= torch.arange(len(bias)) / 10
        before = model.knowledge(IMAGES, domain)


def test_exact_the_gradient_reaches_the_aggregator_through_the_step_alone():
    model = make()
    assert model.aggregator is not None
    weight = model.aggregator.get_parameter("block.ffn.down_proj.weight")
    (gradient,) = torch.autograd.grad(outer(model), weight)
    place = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    ends = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            weight[place] += step
        ends.append(float(outer(model).detach()))
        with torch.no_grad():
            weight[place] -= step
    assert abs(float(gradient[place])) > 1e-7
    assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5)
    (gradient,) = torch.autograd.grad(outer(model, rate=0.0), weight)
    assert not gradient.any(), "no step, no gradient"


def test_no_gradient_reaches_the_experts():
    model = make()
    outer(model).backward()
    assert all(one.grad is None for one in model.bank())
    assert all(one.grad is not None for one in model.student.parameters())


def test_exact_no_step_changes_nothing():
    model = make()
    weights = model.adapt(IMAGES[:3], 0.0)
    assert model.logits(IMAGES, weights).equal(model.logits(IMAGES))


def test_the_step_is_gradient_descent_towards_the_knowledge():
    model = make()
    weights = model.adapt(IMAGES, 0.1, domain=2)
    known = torch.stack([expert(IMAGES) for expert in model.experts[:2]], dim=1)  # type: ignore[union-attr]
    (model.student(IMAGES) - model.aggregator(known).detach()).square().mean().backward()  # type: ignore[misc]
    for name, weight in model.student.named_parameters():
        assert weight.grad is not None
        assert_close(weights[name], weight - 0.1 * weight.grad)


def test_a_dense_model_has_no_bank_and_the_same_student():
    dense, meta = make("dense"), make()
    assert not dense.bank() and dense.aggregator is None
    assert dense.logits(IMAGES, dense.adapt(IMAGES, 0.5)).equal(dense.logits(IMAGES))
    assert dense.student.state_dict().keys() == meta.student.state_dict().keys()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3}, "channels is 16, expected four times it to be a multiple of model.network.heads, 3"),
        ({"channels": 0}, "model.network.channels is 0, expected at least 1"),
        ({"experts": 1}, "model.network.experts is 1, expected at least 2"),
    ],
)
def test_mistakes_are_errors(wrong, message):
    with pytest.raises(UserError, match=message):
        NetworkConfig(**wrong)
