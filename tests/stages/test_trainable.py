import pytest
import torch

from unimoe.errors import UserError
from unimoe.stages.trainable import LoRA, Trainable, choose, merge_lora
from unimoe.testing import tiny_model

IDS = torch.arange(10, 40).reshape(2, 15)


def dense(tmp_path):
    return tiny_model(tmp_path)[0]


def sparse(tmp_path):
    return tiny_model(tmp_path, moe={"num_experts": 3, "placement": "all"})[0]


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def nudge(groups):
    """Give every adapter something to say; their B starts at zero."""
    with torch.no_grad():
        for group in groups:
            for parameter in group.parameters.values():
                parameter.add_(0.1 * torch.randn_like(parameter))


def test_only_what_is_named_trains(tmp_path):
    model = dense(tmp_path)
    groups = choose(model, [Trainable("model.connectors.image.*", 1e-3)], [])
    assert trained(model) == set(groups[0].parameters)
    assert all(name.startswith("model.connectors.image.") for name in trained(model))
    assert groups[0].name == "connectors_image"


def test_first_pattern_takes_the_parameter(tmp_path):
    model = dense(tmp_path)
    groups = choose(
        model,
        [Trainable("*.connectors.image.*", 1e-3), Trainable(["model.connectors.*", "*.norm.*"], 1e-4)],
        [],
    )
    assert not groups[0].parameters.keys() & groups[1].parameters.keys()
    assert any("norm" in name for name in groups[1].parameters)


def test_pattern_without_match_names_it(tmp_path):
    with pytest.raises(UserError, match=r"model\.conectors.*there are.*model\.connectors"):
        choose(dense(tmp_path), [Trainable("model.conectors.*", 1e-3)], [])


def test_nothing_to_train(tmp_path):
    with pytest.raises(UserError, match="nothing trains"):
        choose(dense(tmp_path), [], [])


def test_lora_starts_as_the_model_and_merges_exactly(tmp_path):
    model = dense(tmp_path)
    before = model(IDS).logits
    names = list(model.state_dict())
    groups = choose(model, [], [LoRA("attention", rank=2, alpha=4), LoRA("ffn", rank=3, alpha=3)])
    assert torch.equal(model(IDS).logits, before)
    nudge(groups)
    adapted = model(IDS).logits
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_lora(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-5, atol=1e-5)


def test_each_lora_has_its_rank_and_scale(tmp_path):
    model = dense(tmp_path)
    choose(model, [], [LoRA("attention", rank=2, alpha=4), LoRA("ffn", rank=3, alpha=3)])
    layer = model.model.language_model.layers[0]
    assert layer.self_attn.q_proj.lora_A["default"].weight.shape[0] == 2
    assert layer.self_attn.q_proj.scaling["default"] == 2
    assert layer.mlp.up_proj.lora_A["default"].weight.shape[0] == 3
    assert layer.mlp.up_proj.scaling["default"] == 1


def test_lora_leaves_towers_and_head_alone(tmp_path):
    model = dense(tmp_path)
    choose(model, [], [LoRA("attention"), LoRA("ffn")])
    assert all(".language_model.layers." in name and "lora_" in name for name in trained(model))


def test_expert_lora_and_routers(tmp_path):
    model = sparse(tmp_path)
    before = model(IDS).logits
    names = list(model.state_dict())
    routers = Trainable("*.mlp.router.*", 1e-3)
    groups = choose(model, [routers], [LoRA("experts", rank=2), LoRA("attention", rank=2)])
    assert torch.equal(model(IDS).logits, before)
    nudge(groups)
    adapted = model(IDS).logits
    merge_lora(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(IDS).logits, adapted, rtol=1e-5, atol=1e-5)


def test_gradients_reach_adapters_only(tmp_path):
    model = sparse(tmp_path)
    choose(model, [], [LoRA("experts", rank=2), LoRA("attention", rank=2)])
    model(IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trained(model)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ([LoRA("experts")], "no experts layer"),
        ([LoRA("ffn", match="*.gate")], "no ffn layer"),
        ([LoRA("attention", dropout=0.1), LoRA("ffn")], "share one dropout"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, lora, message):
    with pytest.raises(UserError, match=message):
        choose(dense(tmp_path), [], lora)


def test_experts_take_no_dropout(tmp_path):
    with pytest.raises(UserError, match="no dropout"):
        choose(sparse(tmp_path), [], [LoRA("experts", dropout=0.1)])
