import pytest
import torch

from unimoe.compress.scores import HOW, mixed, random_scores, score
from unimoe.compress.watch import Collector, Stats, watch
from unimoe.errors import UserError
from unimoe.moe.view import view


@torch.no_grad()
def test_scores_by_their_definitions(families, ids):
    model = families("olmoe")
    layers, seen = view(model), {}
    collector = Collector(layers, {"gate", "gnorm", "easy"})
    with collector as stats, watch(layers, lambda one: seen.update({one.layer.index: one})):
        model(input_ids=ids)
    for place, one in seen.items():
        residual, added = one.residual_TD, torch.zeros_like(one.residual_TD)
        for token, weight, y_D in zip(one.token_N.tolist(), one.weight_N, one.y_ND, strict=True):
            added[token] += weight * y_D
        turned = (1 - torch.cosine_similarity(residual, residual + added, dim=1)).tolist()
        expected = {how: [0.0] * 8 for how in HOW}
        count = [0] * 8
        for token, expert, weight, y_D in zip(
            one.token_N.tolist(), one.expert_N.tolist(), one.weight_N.tolist(), one.y_ND, strict=True
        ):
            count[expert] += 1
            expected["frequency"][expert] += 1
            expected["gate"][expert] += weight
            expected["gnorm"][expert] += weight * float(y_D.norm())
            expected["easy_ep"][expert] += weight * float(y_D.norm()) * turned[token]
        expected["reap"] = [total / max(n, 1) for total, n in zip(expected["gnorm"], count, strict=True)]
        for how, values in expected.items():
            torch.testing.assert_close(score(stats, how)[place], torch.tensor(values), rtol=1e-4, atol=1e-5)


def test_domains_have_equal_weight():
    one, two = [torch.tensor([30.0, 10.0])], [torch.tensor([0.0, 0.2])]
    assert mixed([one, two])[0].tolist() == [0.75, 1.25]


def test_random_scores_are_reproducible():
    assert torch.equal(random_scores([4, 3], 1)[0], random_scores([4, 3], 1)[0])
    assert not torch.equal(random_scores([4], 1)[0], random_scores([4], 2)[0])


def test_bad_input():
    stats = Stats(["a"], {"count": [torch.ones(2)]}, tokens=2)
    with pytest.raises(UserError, match="expected random or one of easy_ep"):
        score(stats, "best")
    with pytest.raises(UserError, match="needs the statistic 'easy'"):
        score(stats, "easy_ep")
    stats.tokens = 0
    with pytest.raises(UserError, match="0 calibration tokens"):
        score(stats, "frequency")
