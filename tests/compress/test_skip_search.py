"""The search along the frontier against all places of the grid."""

from itertools import product

import pytest
import torch

from unimoe.compress.skip_search import grid, layer_factors, mean_kl, skip_ratio, staircase


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


def test_the_divergence_is_that_of_torch():
    base_AV, changed_AV = torch.randn(5, 7), torch.randn(5, 7)
    wanted = torch.nn.functional.kl_div(
        changed_AV.log_softmax(-1), base_AV.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert mean_kl(base_AV, changed_AV) == pytest.approx(float(wanted), abs=1e-6)
    assert mean_kl(base_AV, base_AV) == 0
