"""Order in which nested planes are loaded, and which are dropped (D2MoE, arXiv 2504.15299, section 5).

A load is (expert, level): level 0 is the base of an expert's weights, every further level one plane. A level
is of use only with all levels below it, so that the loads of an expert keep their order.
"""

from collections.abc import Callable, Mapping, Sequence

Load = tuple[int, int]
"""Expert and level."""


def hottest_first(requests: Mapping[int, Mapping[int, int]]) -> list[Load]:
    """The order of loads, "hottest expert bit first" (HEBF).

    Every expert has a queue of the levels that its tokens asked for, in ascending order. Of all heads of
    queues the one with the most requests is loaded next; ties go to the lower expert.

    Args:
        requests: expert -> level -> number of tokens that asked for it.
    """
    queues = {expert: sorted(levels) for expert, levels in sorted(requests.items()) if levels}
    order = []
    while queues:
        expert = max(queues, key=lambda e: requests[e][queues[e][0]])
        order.append((expert, queues[expert].pop(0)))
        if not queues[expert]:
            del queues[expert]
    return order


def by_expert(requests: Mapping[int, Mapping[int, int]]) -> list[Load]:
    """The plain order: one expert after another."""
    return [(expert, level) for expert in sorted(requests) for level in sorted(requests[expert])]


def makespan(
    order: Sequence[Load], load_time: Callable[[Load], float], compute_time: Callable[[Load], float]
) -> float:
    """Time at which the last computation ends, if loads run one after another and so do computations, beside
    them.

    The computation of a load starts when its load and all computations before it have ended.
    """
    loaded = computed = 0.0
    for load in order:
        loaded += load_time(load)
        computed = max(computed, loaded) + compute_time(load)
    return computed


def evict(
    resident: Mapping[int, Sequence[int]], need: float, budget: float, size: Callable[[int], float]
) -> dict[int, int]:
    """How many levels of each expert of the previous layer stay, so that ``need`` bytes of the next layer fit
    into ``budget`` (algorithm 2).

    The highest level of all experts goes first, the base last; within a level the higher expert.

    Args:
        resident: expert -> levels in memory, from 0.
        size: bytes of a level of one expert.
    """  # fmt: skip
    kept = {expert: len(levels) for expert, levels in resident.items()}
    used = sum(size(level) for levels in resident.values() for level in levels)
    loads = sorted(((level, expert) for expert, levels in resident.items() for level in levels), reverse=True)
    for level, expert in loads:
        if used + need <= budget:
            break
        used -= size(level)
        kept[expert] = level
    return kept
