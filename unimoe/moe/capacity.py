"""Limits on the number of pairs that an expert takes in a training step; the rest is dropped.

An expert takes at most ``factor`` times the mean number of pairs. The three policies differ in which pairs an
overfull expert keeps. Evaluation drops nothing, so an answer does not depend on the rest of its batch.

Shapes: N (token, expert) pairs sorted by expert, E experts.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import CAPACITY
from .routing import Pairs, Routing

Capacity = Callable[[Routing], Routing]
"""The routing with fewer pairs; the given one notes what was dropped as ``extra["dropped_N"]``."""


@CAPACITY.register("first", source="GShard, arXiv 2006.16668, algorithm 1", axis="capacity")
def keep_first(factor: float = 1.25) -> Capacity:
    """Keep the pairs of the first tokens of the batch.

    Args:
        factor: most pairs of an expert over the mean.
    """
    return lambda routing: limit(routing, factor, -routing.token_N.float())


@CAPACITY.register(
    "probability", source="batch-prioritised routing, V-MoE, arXiv 2106.05974, section 4", axis="capacity"
)
def keep_probable(factor: float = 1.25) -> Capacity:
    """Keep the pairs of largest weight.

    Args:
        factor: most pairs of an expert over the mean.
    """
    return lambda routing: limit(routing, factor, routing.weight_N.detach())


@CAPACITY.register("random", source="Z-code M3, arXiv 2109.10465, random token selection", axis="capacity")
def keep_random(factor: float = 1.25) -> Capacity:
    """Keep a random choice of pairs, so that a token's position does not matter.

    Args:
        factor: most pairs of an expert over the mean.
    """
    return lambda routing: limit(routing, factor, torch.rand_like(routing.weight_N.detach()))


def limit(routing: Routing, factor: float, priority_N: Tensor) -> Routing:
    """The routing with at most ceil(factor * N / E) pairs of each expert, those of the largest priority."""
    most = math.ceil(factor * len(routing.token_N) / routing.num_experts)
    order_N = torch.argsort(priority_N, descending=True, stable=True)
    order_N = order_N[torch.argsort(routing.expert_N[order_N], stable=True)]
    places_N = torch.arange(len(order_N), device=order_N.device)
    rank_N = torch.empty_like(order_N).scatter(0, order_N, places_N - routing.offsets_E1[routing.expert_N])
    kept_N = rank_N < most
    routing.extra["dropped_N"] = ~kept_N
    counts_E = routing.offsets_E1.diff().clamp(max=most)
    pairs = Pairs(
        routing.token_N[kept_N],
        routing.expert_N[kept_N],
        routing.weight_N[kept_N],
        F.pad(counts_E.cumsum(0), (1, 0)),
    )
    return Routing.from_pairs(pairs, routing.logits_TE, routing.probs_TE, routing.extra)
