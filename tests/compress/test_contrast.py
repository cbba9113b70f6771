"""SCMoE on a random Mixtral, and on a random model of ours. Shapes: B rows, V vocabulary."""

import pytest
import torch
from transformers import LogitsProcessorList

from unimoe.compress.contrast import ContrastProcessor, contrast_logits, weak
from unimoe.compress.route import route
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral, tiny_model


@pytest.fixture(scope="module")
def mixtral():
    return tiny_mixtral()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Its experts are copies of one FFN, set apart here."""
    moe = {"num_experts": 4, "top_k": 2}
    model = tiny_model(tmp_path_factory.mktemp("contrast"), moe)[0].eval()
    with torch.no_grad():
        for layer in view(model):
            layer.stacks()["down_proj"].normal_(std=0.3)
    return model


IDS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
PROMPT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def test_the_weaker_answer_is_subtracted_from_likely_tokens():
    strong_BV = torch.tensor([[2.0, 1.9, -5.0], [0.0, 0.1, 0.2]])
    weak_BV = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found_BV = contrast_logits(strong_BV, weak_BV, torch.tensor([[0.5], [0.0]]))
    assert torch.allclose(found_BV[0, :2], torch.tensor([1.5, 2.35])) and found_BV[0, 2] == -torch.inf
    assert torch.equal(found_BV[1], strong_BV[1])


@pytest.mark.parametrize("name", ["mixtral", "ours"])
def test_beta_0_is_greedy_bit_for_bit_and_nothing_stays(name, request):
    model = request.getfixturevalue(name)
    layers = view(model)
    with torch.no_grad():
        before = model(**PROMPT).logits
        greedy = model.generate(**PROMPT, **GREEDY, output_scores=True, return_dict_in_generate=True)
        none = ContrastProcessor(model, layers, PROMPT, 0.0)
        found = model.generate(
            **PROMPT,
            **GREEDY,
            output_scores=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([none]),
        )
        assert torch.equal(found.sequences, greedy.sequences)
        for mine_BV, plain_BV in zip(found.scores, greedy.scores, strict=True):
            likely_BV = mine_BV > -torch.inf
            assert torch.equal(mine_BV[likely_BV], plain_BV[likely_BV])
        strong = ContrastProcessor(model, layers, PROMPT, 5.0)
        other = model.generate(**PROMPT, **GREEDY, logits_processor=LogitsProcessorList([strong]))
        assert not torch.equal(other, greedy.sequences[:, : other.shape[1]])
        assert torch.equal(model(**PROMPT).logits, before)


@pytest.mark.parametrize("name", ["mixtral", "ours", "top_1"])
def test_each_token_visits_its_second_best_expert(name, request):
    """With the weight 1; from a router that chooses one the best is hidden."""
    model = tiny_mixtral(top_k=1) if name == "top_1" else request.getfixturevalue(name)
    layers = view(model)
    seen = {}

    def look(layer, x_TD, index_TK, weight_TK):
        seen[layer.index] = x_TD, index_TK, weight_TK
        return index_TK, weight_TK

    with torch.no_grad(), weak(layers), route(layers, look):
        model(**PROMPT)
    for layer in layers:
        x_TD, index_TK, weight_TK = seen[layer.index]
        ranks_TE = (x_TD @ layer.router_rows().T).argsort(dim=1, descending=True)
        chosen_T = (index_TK + layer.num_experts * (weight_TK == 0)).amin(dim=1)
        real_T = PROMPT["attention_mask"].flatten().bool()
        assert torch.equal(chosen_T[real_T], ranks_TE[:, 1][real_T])
        assert torch.equal(weight_TK.sum(dim=1), torch.ones(len(x_TD)))


def test_caches_of_both_runs_give_what_no_cache_gives(ours):
    """Logits of every step, against both runs over the whole sequence."""
    layers = view(ours)
    with torch.no_grad():
        both = ContrastProcessor(ours, layers, PROMPT, 0.5)
        found = ours.generate(
            **PROMPT,
            **GREEDY,
            output_scores=True,
            return_dict_in_generate=True,
            logits_processor=LogitsProcessorList([both]),
        )
        ids = found.sequences
        mask = torch.nn.functional.pad(PROMPT["attention_mask"], (0, ids.shape[1] - 5), value=1)
        strong = ours(input_ids=ids, attention_mask=mask).logits
        with weak(layers):
            weaker = ours(input_ids=ids, attention_mask=mask).logits
    for step, scores_BV in enumerate(found.scores):
        allowed = scores_BV > -torch.inf
        wanted = 1.5 * strong[:, 4 + step] - 0.5 * weaker[:, 4 + step]
        assert torch.allclose(scores_BV[allowed], wanted[allowed], atol=1e-4)
