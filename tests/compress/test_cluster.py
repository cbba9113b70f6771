import itertools

import pytest
import torch

from unimoe.compress.cluster import (
    agglomerate,
    bisect_clusters,
    k_means,
    representatives,
    router_distance,
    windows,
)


def rows(seed, experts=5):
    return torch.randn(experts, 6, generator=torch.Generator().manual_seed(seed))


def test_planted_duplicates_join_first():
    router = rows(0)
    router[3] = router[1]
    distance = router_distance(router)
    assert distance[1, 3] == 0
    assert agglomerate(distance, 1e-6) == [0, 1, 2, 1, 3]
    assert agglomerate(distance, 0.0) == [0, 1, 2, 3, 4]
    assert agglomerate(distance, 1e9) == [0] * 5


def test_complete_linkage_looks_at_every_pair():
    distance = torch.tensor([[0.0, 1, 3], [1, 0, 1.5], [3, 1.5, 0]])
    assert agglomerate(distance, 2.0) == [0, 0, 1]  # 1 and 2 are close, but 0 and 2 are not
    assert agglomerate(distance, 3.1) == [0, 0, 0]


def test_experts_that_are_selected_together_are_nearer():
    router, cosel = rows(1), torch.zeros(5, 5)
    cosel[0, 4] = cosel[4, 0] = 9
    with_data = router_distance(router, cosel, 1.0, 2.0)
    assert (
        with_data[0, 4] < router_distance(router)[0, 4] and with_data[0, 1] == router_distance(router)[0, 1]
    )


def test_one_threshold_serves_layers_whose_routers_differ_in_size():
    layers = [rows(2), rows(3)]
    found = bisect_clusters([router_distance(one) for one in layers], 6)[1]
    small = [router_distance(0.25 * layers[0]), router_distance(layers[1])]
    assert bisect_clusters(small, 6)[1] == found


@pytest.mark.parametrize("seed", range(6))
def test_bisection_equals_the_exhaustive_search(seed):
    """Over every threshold between two distances of three layers."""
    distances = [router_distance(rows(10 * seed + layer, 4 + layer)) for layer in range(3)]
    steps = torch.cat([one[torch.triu_indices(len(one), len(one), 1).unbind()] for one in distances]).unique()
    ways = [0.0, *((steps[:-1] + steps[1:]) / 2).tolist(), float(steps[-1]) + 1]
    counts = {sum(max(agglomerate(one, way)) + 1 for one in distances) for way in ways}
    for total in range(3, 16):
        _, found = bisect_clusters(distances, total)
        reached = sum(max(one) + 1 for one in found)
        assert abs(reached - total) == min(abs(count - total) for count in counts)


def test_layers_of_one_expert_are_their_own_clusters():
    assert bisect_clusters([torch.zeros(1, 1)] * 2, 2)[1] == [[0], [0]]


def test_the_representative_is_nearest_to_the_mean():
    experts = [torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([5.0]), torch.tensor([9.0])]
    assert representatives(experts, [0, 0, 0, 1]) == [1, 3]


def test_k_means_finds_planted_clusters_and_is_the_identity_at_k_experts():
    centers = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    outputs = torch.stack([centers[index] + 0.01 * torch.randn(7, 8) for index in (0, 1, 0, 2, 1, 0)])
    for seed in range(3):
        assert k_means(outputs, 3, seed)[0] == [0, 1, 0, 2, 1, 0]
        groups, distortion = k_means(outputs, 6, seed)
        assert groups == [0, 1, 2, 3, 4, 5] and abs(distortion) < 1e-5
        assert max(k_means(torch.ones(4, 2, 3), 3, seed)[0]) == 2  # equal experts, still three clusters


def test_windows_divide_clusters_where_they_help():
    """A layer of equal experts leaves its clusters to its neighbour, over all ways to divide them."""
    same = torch.randn(1, 5, 8).expand(4, 5, 8)
    different = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
    found = windows([same, different, different], 2)
    assert [max(one) + 1 for one in found] == [1, 3, 2]
    best = min(k_means(same, one)[1] + k_means(different, 4 - one)[1] for one in itertools.chain(range(1, 4)))
    assert abs(k_means(same, 1)[1] + k_means(different, 3)[1] - best) < 1e-6
