"""Compressed experts against the stock block, on a random Mixtral and a random model of ours."""

import pytest
import torch

from unimoe.compress.compressed_experts import attach, auxiliary_scale, detached
from unimoe.compress.route import route
from unimoe.compress.tune import TuneConfig, distil, divergence
from unimoe.errors import UserError
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral, tiny_model

IDS = torch.tensor([[5, 6, 7, 5, 6, 8, 9, 3]])


def first_only(count):
    """The routing cut to its ``count`` best experts, whose weights stay."""

    def fn(layer, x_TD, index_TK, weight_TK):
        weight_TK, order_TK = weight_TK.sort(dim=1, descending=True)
        return index_TK.gather(1, order_TK)[:, :count], weight_TK[:, :count]

    return fn


def ours(folder, act="silu"):
    model = tiny_model(folder, {"num_experts": 4, "top_k": 3})[0].eval()
    for layer in view(model):
        layer.experts.act = act  # GELU gates come with models such as Gemma
    with torch.no_grad():
        for layer in view(model):
            layer.stacks()["down_proj"].normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", ["mixtral", "silu", "gelu"])
def test_at_the_start_it_is_the_choice_cut_short(kind, tmp_path):
    model = tiny_mixtral(top_k=3) if kind == "mixtral" else ours(tmp_path, kind)
    with torch.no_grad():
        with route(view(model), first_only(2)):
            wanted = model(input_ids=IDS).logits
        whole = model(input_ids=IDS).logits
        attach(view(model), 2)
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, wanted, atol=2e-5)
    assert not torch.allclose(found, whole, atol=1e-3)
    assert sum("theta" in name for name in model.state_dict()) == len(view(model))


def test_without_auxiliary_experts_nothing_is_scaled():
    theta_EV = torch.rand(4, 5)
    index_TA, weight_TA = torch.tensor([[1, 3], [4, 4]]), torch.tensor([[0.3, 0.1], [0.0, 0.0]])
    found_TV = auxiliary_scale(theta_EV, index_TA, weight_TA)
    assert torch.allclose(found_TV[0], 0.75 * theta_EV[1] + 0.25 * theta_EV[3])
    assert torch.equal(found_TV[1], torch.ones(5))


def test_tuning_brings_it_nearer_and_moves_the_vectors_of_chosen_auxiliaries_only():
    model = tiny_mixtral(experts=6, top_k=3)
    layers, batch = view(model), {"input_ids": IDS, "labels": IDS}
    auxiliary = [set(), set()]

    def look(layer, x_TD, index_TK, weight_TK):
        order_TK = weight_TK.argsort(dim=1, descending=True)
        auxiliary[layer.index] |= set(index_TK.gather(1, order_TK)[:, 1:].flatten().tolist())
        return index_TK, weight_TK

    with torch.no_grad():
        teacher = model(**batch).logits[:, :-1].log_softmax(-1)
    attach(layers, 1)
    with torch.no_grad():
        before = divergence(teacher, model(**batch).logits[:, :-1])
    thetas = [layer.block.theta for layer in layers]

    with route(layers, look):
        losses = distil(
            model, [batch], thetas, TuneConfig(steps=12, lr=0.05), teacher=lambda: detached(layers)
        )
    assert losses[0] == pytest.approx(float(before), abs=1e-5) and min(losses[1:]) < losses[0]
    for used, theta_EV in zip(auxiliary, thetas, strict=True):
        moved = {index for index in range(6) if not torch.equal(theta_EV[index], torch.ones(96))}
        assert moved and moved <= used


def test_as_many_main_experts_as_the_router_chooses_are_refused():
    with pytest.raises(UserError, match="expected 1 to 1"):
        attach(view(tiny_mixtral()), 2)
