"""The rule of MC-MoE's online pruning, and which tokens it protects."""

import logging

import pytest
import torch

from unimoe.compress.odp import Ratios, importance, important
from unimoe.compress.route import route
from unimoe.compress.skip_rules import install
from unimoe.errors import UserError
from unimoe.moe import Context, routing_context
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
    install(view(model), Ratios([0.0, 0.0], protect=0.0))
    assert torch.equal(routings(model)[0], routings(plain)[0])
    install(view(model), Ratios([9.0, 9.0], protect=0.0))
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


def test_importance_is_the_attention_a_token_gets():
    """Token j against a sum over the queries from j on; the released code's sum over keys is always 1."""
    x_SD, attention_HSS = torch.randn(5, 3), torch.randn(2, 5, 5).tril().exp().tril()
    attention_HSS = attention_HSS / attention_HSS.sum(-1, keepdim=True)
    for token in range(5):
        received = sum(attention_HSS[:, query, token].mean() for query in range(token, 5))
        wanted = x_SD[token].abs().sum() * received / (5 - token)
        assert torch.allclose(importance(x_SD, attention_HSS)[token], wanted)
        code = x_SD[token].abs().sum() / (5 - token)
        assert torch.allclose(importance(x_SD, attention_HSS, compat=True)[token], code)


def test_a_share_of_each_rows_real_tokens_is_important():
    x_TD, attention = torch.ones(8, 3), torch.ones(2, 1, 4, 4).tril() / torch.arange(1, 5)[:, None]
    pad_T = torch.tensor([True, True, False, False, False, False, False, False])
    with routing_context(Context(pad_T=pad_T)):
        found_T = important(x_TD, attention, 0.5)
    assert found_T.view(2, 4).sum(1).tolist() == [1, 2] and not found_T[pad_T].any()


def test_protected_tokens_of_a_prompt_keep_their_experts():
    model = tiny_mixtral()
    model.set_attn_implementation("eager")
    install(view(model), Ratios([9.0, 9.0], protect=0.25))
    for weight_TK in routings(model)[1]:
        assert int((weight_TK == 0).sum()) == 6, "2 of 8 tokens keep both"


def test_without_attention_weights_there_is_a_warning(caplog):
    model = tiny_mixtral()
    model.set_attn_implementation("sdpa")
    install(view(model), Ratios([9.0, 0.0], protect=0.25))
    with caplog.at_level(logging.WARNING):
        routings(model)
        routings(model)
    assert [record.getMessage().count("eager") for record in caplog.records] == [1]


def test_ratios_of_another_model_are_refused():
    with pytest.raises(UserError, match="expected one for each of 2"):
        install(view(tiny_mixtral()), Ratios([0.5]))
