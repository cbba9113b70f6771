"""The rule of MC-MoE's online pruning."""

import pytest
import torch

from unimoe.compress.odp import Ratios
from unimoe.compress.route import route
from unimoe.compress.skip_rules import install
from unimoe.errors import UserError
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral

IDS = torch.tensor([[5, 6, 7, 5, 6, 8, 9, 3]])


def routings(model):
    """Logits, and the weights of each layer as they reach the experts."""
    seen = []

    def look(layer, x_TD, index_TK, weight_TK):
        seen.append(weight_TK)
        return index_TK, weight_TK

    with torch.no_grad(), route(view(model), look):
        logits = model(input_ids=IDS).logits
    return logits, seen


def test_mu_0_is_the_model_and_a_large_mu_is_top_1():
    plain, model = tiny_mixtral(), tiny_mixtral()
    install(view(model), Ratios([0.0, 0.0]))
    assert torch.equal(routings(model)[0], routings(plain)[0])
    install(view(model), Ratios([9.0, 9.0]))
    for weight_TK in routings(model)[1]:
        assert torch.equal((weight_TK == 0).sum(1), torch.ones(8))
        assert torch.allclose(weight_TK.amax(1), torch.ones(8)), "the first has the weight of both"


def test_a_second_expert_goes_below_mu_times_the_first():
    layer = view(tiny_mixtral())[1]
    index_TK = torch.tensor([[0, 1], [2, 3]])
    weight_TK = torch.tensor([[0.6, 0.4], [0.7, 0.3]])
    index, weight = Ratios([0.0, 0.5]).apply(layer, 2, torch.zeros(2, 32), index_TK, weight_TK)
    assert index.tolist() == [[0, 1], [2, 4]]
    assert torch.allclose(weight, torch.tensor([[0.6, 0.4], [1.0, 0.0]]))


def test_ratios_of_another_model_are_refused():
    with pytest.raises(UserError, match="expected one for each of 2"):
        install(view(tiny_mixtral()), Ratios([0.5]))
