import logging
from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from unimoe.moe import hf
from unimoe.testing_stock import STOCK, TINY

OURS = ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3")


def run(model, implementation, ids):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("name", OURS)
def test_stock_models_equal_eager(name, monkeypatch):
    calls = []
    plain = hf.fused_experts
    monkeypatch.setattr(hf, "fused_experts", lambda *args: calls.append(1) or plain(*args))
    model = STOCK[name]()
    ids = torch.randint(1, 64, (2, 17))
    logits, gradients = run(model, "eager", ids)
    assert not calls
    ours, our_gradients = run(model, "unimoe", ids)
    assert calls, "the registered function did not run"
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for key in gradients:
        torch.testing.assert_close(our_gradients[key], gradients[key], rtol=0, atol=1e-5)


def test_built_with_our_implementation_generates_as_eager():
    model = STOCK["mixtral"](experts_implementation="unimoe").eval()
    assert model.config._experts_implementation == "unimoe"
    ids = torch.randint(1, 64, (1, 5))
    ours = model.generate(ids, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("eager")
    assert torch.equal(ours, model.generate(ids, max_new_tokens=8, do_sample=False))


def experts(**kw) -> Any:
    module = MixtralExperts(MixtralConfig(**TINY, intermediate_size=48, num_local_experts=4, **kw))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def test_sentinel_ids_are_ignored():
    module = experts()
    x = torch.randn(6, 32, requires_grad=True)
    index = torch.tensor([[0, 4], [4, 1], [2, 3], [4, 4], [0, 1], [3, 4]])
    weight = torch.rand(6, 2, requires_grad=True)
    module.config._experts_implementation = "eager"
    here = index < 4  # not every version's eager form takes sentinels
    eager = module(x, index.where(here, 0), weight.where(here, 0))
    eager_grads = torch.autograd.grad(eager.square().sum(), [x, weight, *module.parameters()])
    ours = hf.experts_forward(module, x, index, weight)
    our_grads = torch.autograd.grad(ours.square().sum(), [x, weight, *module.parameters()])
    torch.testing.assert_close(ours, eager, rtol=0, atol=1e-5)
    assert ours[3].count_nonzero() == 0 and our_grads[1][3].count_nonzero() == 0
    for one, other in zip(our_grads, eager_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_other_activations_run_in_transformers_own_and_say_so(caplog, monkeypatch):
    monkeypatch.setattr(hf, "_said", set())
    module = experts(hidden_act="gelu")
    x, index, weight = torch.randn(3, 32), torch.tensor([[0, 1], [2, 3], [0, 3]]), torch.rand(3, 2)
    module.config._experts_implementation = "eager"
    with caplog.at_level(logging.WARNING, logger=hf.__name__):
        torch.testing.assert_close(
            hf.experts_forward(module, x, index, weight), module(x, index, weight), rtol=0, atol=1e-5
        )
    assert caplog.messages == [
        "MixtralExperts runs in transformers' grouped_mm: its activation is GELUActivation, not SiLU"
    ]
