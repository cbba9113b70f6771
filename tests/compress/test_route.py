import pytest
import torch
from torch import nn

from unimoe.compress.route import choose, route
from unimoe.detection import DynamicDinoConfig
from unimoe.detection.model.decoder import feed_forward
from unimoe.moe import record
from unimoe.moe.few_rows import few_rows
from unimoe.moe.view import view

from .conftest import FAMILIES


def loss(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_hook_that_changes_nothing_changes_nothing(name, families, ids):
    model = families(name)
    before = loss(model, ids)
    layers = view(model)
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
    x = torch.randn(2, 5, 32)
    before = layers[0].block(x)
    with route(layers, lambda _, x, index, weight: (index, weight)), choose(layers, lambda _, z: z):
        assert torch.equal(layers[0].block(x), before)
