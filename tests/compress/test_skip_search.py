"""The search along the frontier against all places of the grid."""

from itertools import product

import pytest
import torch

from unimoe.compress.measure import reference
from unimoe.compress.skip import Thresholds
from unimoe.compress.skip_search import (
    cost_of,
    find_ratios,
    find_thresholds,
    grid,
    layer_factors,
    skip_ratio,
    staircase,
)
from unimoe.errors import UserError
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral


def monotone(sizes, seed):
    """A ratio and a cost that grow with each index: sums of positive steps, and their products."""
    noise = torch.Generator().manual_seed(seed)
    steps = [torch.rand(size, generator=noise).cumsum(0) for size in sizes]
    costs = [torch.rand(size, generator=noise).pow(4).cumsum(0) for size in sizes]
    total = sum(float(step[-1]) for step in steps)

    def ratio(place):
        return sum(float(step[index]) for step, index in zip(steps, place, strict=True)) / total

    def cost(place):
        parts = [float(one[index]) for one, index in zip(costs, place, strict=True)]
        return sum(parts) + torch.tensor(parts).prod().item()

    return ratio, cost


@pytest.mark.parametrize("sizes", [(40,), (30, 30), (4, 9, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_has_the_best_place_of_all(sizes, seed):
    ratio, cost = monotone(sizes, seed)
    asked, priced = [], []
    found = staircase(
        sizes,
        lambda place: asked.append(place) or ratio(place),
        lambda place: priced.append(place) or cost(place),
        0.5,
    )
    every = [place for place in product(*map(range, sizes)) if ratio(place) >= 0.5]
    assert found is not None and ratio(found) >= 0.5
    assert cost(found) == min(map(cost, every))
    others = torch.tensor(sizes[:-2]).prod().item()
    assert len(asked) <= others * 2 * sum(sizes[-2:]) and len(priced) <= others * min(sizes[-2:])


def test_a_ratio_out_of_reach_gives_no_place():
    assert staircase((3, 3), lambda place: sum(place) / 4, lambda place: 0.0, 1.1) is None
    assert staircase((3, 3), lambda place: sum(place) / 4, lambda place: 0.0, 1.0) == (2, 2)


def test_thresholds_are_quantiles_of_the_scores():
    score_N = torch.tensor([0.4, 0.1, 0.3, 0.2])
    tau = grid(score_N, 5)
    assert [skip_ratio({"text": score_N}, {"text": value}) for value in tau] == [0, 0.25, 0.5, 0.75, 1]
    assert tau[0] == 0 and grid(score_N, 3, most=0.5)[-1] == pytest.approx(0.3)


def test_the_ratio_is_over_the_pairs_of_all_groups():
    scores = {"text": torch.tensor([0.1, 0.9]), "media": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    assert skip_ratio(scores, {"text": 0.5, "media": 0.25}) == 3 / 6


def test_factors_are_shares_of_the_divergences():
    assert layer_factors([3.0, 1.0, -1e-9]) == [0.75, 0.25, 0.0]
    assert layer_factors([0.0, 0.0]) == [0.5, 0.5]


@pytest.fixture(scope="module")
def search():
    """A random Mixtral, its layers and two domains of tokens, some of them padding."""
    model = tiny_mixtral(top_k=3)
    noise = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 60, (3, 12), generator=noise) for _ in range(2)]
    batches = {
        f"domain {index}": [{"input_ids": one, "labels": one, "attention_mask": torch.ones_like(one)}]
        for index, one in enumerate(ids)
    }
    batches["domain 1"][0]["attention_mask"][0, :5] = 0
    layers = view(model)
    return model, layers, reference(model, batches), batches


def test_thresholds_skip_what_was_asked_at_the_least_cost(search):
    model, layers, original, batches = search
    found = find_thresholds(model, layers, original, batches, 0.4, size=6)
    tau = found.rule.tau["text"]
    assert found.tried == 1 and set(found.rule.tau) == {"text"}
    assert found.counted.ratio() == pytest.approx(0.4, abs=0.08), "later layers' weights move"
    assert found.worst == max(one.kl for one in found.quality.values()) > 0
    assert cost_of(Thresholds({"text": tau}), model, layers, original, batches).worst == found.worst
    assert find_thresholds(model, layers, original, batches, 0.0, size=3).worst == 0


def test_factors_of_the_layers_are_measured_where_they_are_asked_for(search):
    model, layers, original, batches = search
    found = find_thresholds(model, layers, original, batches, 0.4, power=1.0, size=6)
    assert sum(found.rule.alpha["text"]) == pytest.approx(1) and found.rule.power == 1
    assert all(0 < one < 1 for one in found.rule.alpha["text"])


def test_ratios_are_quantiles_over_all_experts_behind_the_first(search):
    model, layers, original, batches = search
    for ratio in (0.1, 0.3, 0.5):
        one = find_ratios(model, layers, original, batches, ratio)
        assert all(0 < mu <= 1 for mu in one.rule.mu)
        assert one.counted.ratio() == pytest.approx(ratio, abs=0.03), "later layers' weights move"
    best = find_ratios(model, layers, original, batches, 0.1, blocks=1)
    assert sorted(map(bool, best.rule.mu)) == [False, True]
    with pytest.raises(UserError, match="cannot skip behind their first experts"):
        find_ratios(model, layers, original, batches, 0.4, blocks=1)  # of 1/2 * 2/3
