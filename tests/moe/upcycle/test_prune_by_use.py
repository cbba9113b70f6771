from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.errors import UserError
from unimoe.moe import ExpertLoad, MoEConfig, expert_load, install_moe, prune_by_use, record
from unimoe.moe.install import moe_layers

IDS = torch.arange(20).reshape(2, 10)


def mixture(**moe: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    settings = {"router": {"kind": "top_k", "k": 1, "init_std": 1.0}, "placement": "all"}
    config = MoEConfig.from_dict({**settings, "experts": {"copies": 4, "noise": 0.5}, **moe})
    install_moe(model.model, config)
    model.config.moe = config.to_dict()
    return model


def test_exact_keeping_all_experts_changes_nothing():
    model = mixture()
    before = model(input_ids=IDS).logits
    kept = prune_by_use(model, {0: ExpertLoad(torch.ones(4)), 1: ExpertLoad(torch.arange(4.0))}, 4)
    assert kept[1].tolist() == [0, 1, 2, 3] and torch.equal(model(input_ids=IDS).logits, before)


def test_exact_experts_that_nobody_visits_are_not_missed():
    model = mixture()
    for layer in moe_layers(model).values():
        layer.router.weight.data[[0, 2]] = 0.0
        layer.router.weight.data[1] = -layer.router.weight.data[3]  # one of them is above 0
    with record() as records:
        before = model(input_ids=IDS).logits
    loads = {one.layer: expert_load(one) for one in records}
    assert all(load.tokens_per_expert[[0, 2]].sum() == 0 for load in loads.values())
    kept = prune_by_use(model, loads, 2)
    assert kept[0].tolist() == [1, 3] and model.config.moe["experts"]["copies"] == 2
    torch.testing.assert_close(model(input_ids=IDS).logits, before)
    fresh = mixture(**model.config.moe)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits), "the configuration fits"


def test_slices_of_a_copy_stay_together():
    model = mixture(experts={"copies": 3, "slices": 2}, router={"kind": "top_k", "k": 2})
    load = ExpertLoad(torch.tensor([3.0, 3.0, 7.0, 0.0, 0.0, 5.0]))
    kept = prune_by_use(model, {0: load, 1: load}, 2)
    assert kept[0].tolist() == [0, 1, 2, 3]


def test_mistakes_name_what_was_found():
    model = mixture(router={"kind": "top_k", "k": 2})
    loads = {layer: ExpertLoad(torch.ones(4)) for layer in range(2)}
    for copies in (1, 5):
        with pytest.raises(UserError, match=rf"{copies} copies are to be kept, expected 2..4"):
            prune_by_use(model, loads, copies)
