"""Which experts are alike.

Shapes: E experts of a layer, m tokens, D hidden.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = list[int]
"""Number of the cluster of each expert, counted from 0 in the order of first members."""


def router_distance(
    router_ED: Tensor, cosel_EE: Tensor | None = None, l1: float = 1.0, l2: float = 0.0
) -> Tensor:
    """[E, E] l1 |W_i - W_j| / |W| - l2 a_ij: rows of the router, and how often both are selected over the
    layer's mean (STUN, arXiv 2409.06211, eq. 8). No data is needed with l2 = 0.

    The released code divides by the norm |W| of the whole router, the paper does not say so. Without it one
    threshold for all layers (:func:`bisect_clusters`) empties those whose routers are small.
    """
    rows_ED = router_ED.float() / router_ED.float().norm().clamp(min=1e-20)
    distance_EE = l1 * torch.cdist(rows_ED, rows_ED, compute_mode="donot_use_mm_for_euclid_dist")
    if cosel_EE is not None and l2:
        away_EE = cosel_EE.clone().fill_diagonal_(0)
        distance_EE = distance_EE - l2 * away_EE / away_EE.mean().clamp(min=1e-9)
    return distance_EE


def agglomerate(distance_EE: Tensor, threshold: float) -> Groups:
    """Greedy clusters with complete linkage (STUN, algorithm 1; thnkinbtfly/STUN): the closest pair of
    experts below the threshold joins its two clusters, if every pair across them is below it, too."""
    experts = len(distance_EE)
    members = [{expert} for expert in range(experts)]
    of = list(range(experts))
    first, second = torch.triu_indices(experts, experts, 1)
    order = distance_EE[first, second].sort(stable=True)
    for value, pair in zip(order.values.tolist(), order.indices.tolist(), strict=True):
        if value >= threshold:
            break
        a, b = of[int(first[pair])], of[int(second[pair])]
        if a == b:
            continue
        across = distance_EE[sorted(members[a])][:, sorted(members[b])]
        if bool((across < threshold).all()):
            members[a] |= members[b]
            for expert in members[b]:
                of[expert] = a
            members[b] = set()
    return renumber(of)


def bisect_clusters(distances: Sequence[Tensor], total: int) -> tuple[float, list[Groups]]:
    """One threshold for all layers, so that they have ``total`` clusters together, or the nearest number that
    can be reached: layers end with different numbers (STUN, section 4).

    Returns:
        The threshold and the clusters of each layer.
    """
    values = [one[torch.triu_indices(len(one), len(one), 1).unbind()] for one in distances]
    steps = torch.cat(values).unique()
    if not len(steps):  # one expert in every layer
        return 0.0, [[0] for _ in distances]
    thresholds = [float(steps[0]), *(steps[:-1] / 2 + steps[1:] / 2).tolist(), float(steps[-1]) + 1.0]

    def at(place: int) -> list[Groups]:
        return [agglomerate(one, thresholds[place]) for one in distances]

    def count(groups: list[Groups]) -> int:
        return sum(max(one) + 1 for one in groups)

    low, high = 0, len(thresholds) - 1
    tried = {place: at(place) for place in (low, high)}
    while high - low > 1:
        middle = (low + high) // 2
        tried[middle] = at(middle)
        low, high = (middle, high) if count(tried[middle]) > total else (low, middle)
    best = min(tried, key=lambda place: (abs(count(tried[place]) - total), place))
    return thresholds[best], tried[best]


def representatives(experts: Sequence[Tensor], groups: Groups) -> list[int]:
    """The member of each cluster whose weights [X], flattened, are closest to their mean; ascending."""
    found = []
    for cluster in range(max(groups) + 1):
        members = [expert for expert, of in enumerate(groups) if of == cluster]
        stacked = torch.stack([experts[expert].float() for expert in members])
        found.append(members[int((stacked - stacked.mean(0)).norm(dim=1).argmin())])
    return sorted(found)


def cosines(y_EmD: Tensor) -> Callable[[Tensor], Tensor]:
    """Distance of every expert to a centroid [m, D]: 1 - the mean over tokens of the cosine of the outputs
    (Sub-MoE, arXiv 2506.23266, eq. 2)."""
    return lambda centroid_mD: 1 - F.cosine_similarity(y_EmD, centroid_mD[None], dim=-1).mean(-1)


def k_means(y_EmD: Tensor, clusters: int, seed: int = 0, rounds: int = 50) -> tuple[Groups, float]:
    """k-means++ on the outputs of all experts for the same tokens; a centroid is the mean of its members'
    outputs (Sub-MoE, section 3.2).

    Returns:
        The clusters, exactly as many, and the sum of all distances to the own centroid.
    """
    generator = torch.Generator().manual_seed(seed)
    y_EmD = y_EmD.float()
    to = cosines(y_EmD)
    chosen = [int(torch.randint(len(y_EmD), (), generator=generator))]
    nearest_E = to(y_EmD[chosen[0]])
    while len(chosen) < clusters:
        chance_E = nearest_E.clamp(min=0).square()
        chance_E[chosen] = 0
        if float(chance_E.sum()) <= 0:  # the rest equals what was chosen
            chance_E = torch.ones(len(y_EmD))
            chance_E[chosen] = 0
        chosen.append(int(torch.multinomial(chance_E, 1, generator=generator)))
        nearest_E = torch.minimum(nearest_E, to(y_EmD[chosen[-1]]))
    centroids = [y_EmD[expert] for expert in chosen]
    of_E = torch.full((len(y_EmD),), -1)
    for _ in range(rounds):
        distance_EC = torch.stack([to(centroid) for centroid in centroids], dim=1)
        new_E = distance_EC.argmin(1)
        for cluster in range(clusters):  # none may be empty: it takes the expert that fits its own least
            if not bool((new_E == cluster).any()):
                sizes_E = new_E.bincount(minlength=clusters)[new_E]
                own_E = distance_EC.gather(1, new_E[:, None])[:, 0].masked_fill(sizes_E < 2, -torch.inf)
                new_E[own_E.argmax()] = cluster
        if torch.equal(new_E, of_E):
            break
        of_E = new_E
        centroids = [y_EmD[of_E == cluster].mean(0) for cluster in range(clusters)]
    distance_EC = torch.stack([to(centroid) for centroid in centroids], dim=1)
    return renumber(of_E.tolist()), float(distance_EC.gather(1, of_E[:, None]).sum())


def windows(layers: Sequence[Tensor], clusters: int, window: int = 2, seed: int = 0) -> list[Groups]:
    """Clusters of all layers, ``clusters`` a layer on average: ``window`` neighbouring layers share theirs,
    and divide them so that the sum of all distances is smallest (Sub-MoE's adaptive allocation, section 3.2,
    which clusters both layers' experts together; windows of 2 are its best).

    Args:
        layers: of each [E, m, D] outputs of all experts for the same tokens.
        clusters: mean number of a layer, 1..E.
        window: 1 or 2.
        seed: seed of k-means++.
    """
    found: list[Groups] = []
    for start in range(0, len(layers), window):
        both = layers[start : start + window]
        if len(both) == 1:
            found.append(k_means(both[0], clusters, seed)[0])
            continue
        sizes = [len(one) for one in both]
        ways = [k for k in range(1, 2 * clusters) if k <= sizes[0] and 1 <= 2 * clusters - k <= sizes[1]]
        tried = {k: (k_means(both[0], k, seed), k_means(both[1], 2 * clusters - k, seed)) for k in ways}
        best = min(ways, key=lambda k: (sum(one[1] for one in tried[k]), abs(k - clusters)))
        found += [one[0] for one in tried[best]]
    return found


def renumber(of: Sequence[int]) -> Groups:
    """Clusters counted in the order of their first members."""
    order = {old: new for new, old in enumerate(dict.fromkeys(of))}
    return [order[one] for one in of]
