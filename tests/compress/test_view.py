import pytest
import torch
from torch import nn

from unimoe.compress.view import choose, route, view
from unimoe.detection import DynamicDinoConfig
from unimoe.detection.model.decoder import feed_forward
from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.moe.few_rows import few_rows

from .conftest import FAMILIES


def loss(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_finds_every_layer_and_changes_nothing(name, families, ids):
    model = families(name)
    before = loss(model, ids)
    layers = view(model)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert {layer.layer for layer in layers} == ({1} if "deepseek" in name else {0, 1})
    assert all(layer.groups == (2 if name == "deepseek_v3" else 1) for layer in layers)
    shared = name in ("qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe")
    for layer in layers:
        assert (layer.shared is not None) == shared
        assert layer.router_rows().shape == (layer.num_experts, 32)
        one = layer.expert(layer.num_experts - 1)
        assert one["gate"].shape == one["up"].shape == one["down"].T.shape
        assert one["gate"].untyped_storage().data_ptr() in {
            stack.untyped_storage().data_ptr() for stack in layer.stacks().values()
        }
    with route(layers, lambda layer, x, index, weight: (index, weight)), choose(layers, lambda _, z: z):
        assert torch.equal(loss(model, ids), before)
    assert torch.equal(loss(model, ids), before)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "unimoe"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "unimoe"])
@torch.no_grad()
def test_a_skipped_expert_gives_nothing(name, implementation, families, ids):
    model = families(name)
    if name != "unimoe":
        model.set_experts_implementation(implementation)
    layers, before = view(model), loss(model, ids)

    def skip(layer, x_TD, index_TK, weight_TK):
        return index_TK.masked_fill(weight_TK < 0.5, layer.num_experts), weight_TK

    def zero(layer, x_TD, index_TK, weight_TK):
        return index_TK, weight_TK.masked_fill(weight_TK < 0.5, 0)

    with route(layers, skip):
        skipped = loss(model, ids)
    with route(layers, zero):
        torch.testing.assert_close(skipped, loss(model, ids), rtol=0, atol=1e-5)
    assert (skipped - before).abs().max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_fewer_slots_and_shifted_logits(name, families, ids):
    model = families(name)
    layers, before = view(model), loss(model, ids)
    with route(layers, lambda layer, x, index, weight: (index[:, :1], weight[:, :1])):
        assert (loss(model, ids) - before).abs().max() > 1e-3
    shift = torch.randn(8, requires_grad=True)
    with torch.enable_grad(), choose(layers, lambda layer, z: z + shift[: z.shape[1]]):
        loss(model, ids).logsumexp(-1).sum().backward()
    assert shift.grad is not None and shift.grad.count_nonzero() > 0


@torch.no_grad()
def test_hooks_reach_the_layer_while_few_rows_decodes(families, ids):
    model = families("unimoe")
    layers = view(model)
    with few_rows(model):
        before = loss(model, ids[:1])
        with record() as records, route(layers, lambda _, x, index, weight: (index[:, :1], weight[:, :1])):
            assert (loss(model, ids[:1]) - before).abs().max() > 1e-3
        assert len(records[0].routing.token_N) == ids.shape[1]
        with choose(layers, lambda _, z: -z):
            assert (loss(model, ids[:1]) - before).abs().max() > 1e-3
        assert torch.equal(loss(model, ids[:1]), before)


@torch.no_grad()
def test_the_detector_is_a_mixture_like_others():
    moe = {"experts": {"copies": 3, "slices": 2}, "router": {"k": 2}, "placement": "all"}
    config = DynamicDinoConfig(d_model=32, ffn_dim=24, num_heads=4, decoder_layers=2, moe=moe)
    decoder = nn.ModuleDict(
        {str(layer): nn.ModuleDict({"ffn": feed_forward(config, layer)}) for layer in (0, 1)}
    )
    layers = view(decoder)
    assert [(layer.name, layer.layer, layer.num_experts) for layer in layers] == [
        ("0.ffn", 0, 6),
        ("1.ffn", 1, 6),
    ]
    assert {name: one.shape for name, one in layers[0].expert(5).items()} == {
        "up": (12, 32),
        "down": (32, 12),
    }
    x = torch.randn(2, 5, 32)
    before = layers[0].block(x)
    with route(layers, lambda _, x, index, weight: (index, weight)), choose(layers, lambda _, z: z):
        assert torch.equal(layers[0].block(x), before)


def test_models_without_mixtures_are_refused():
    with pytest.raises(UserError, match="Linear has no MoE layers"):
        view(nn.Linear(2, 2))
