import random
from itertools import permutations

from unimoe.compress.schedule import by_expert, evict, hottest_first, makespan


def trace(seed, experts=4, levels=3, tokens=24):
    """Tokens choose an expert and a level at random; asking for a level asks for those below it."""
    draw = random.Random(seed)
    weights = [draw.random() ** 2 for _ in range(experts)]
    requests = {expert: dict.fromkeys(range(levels), 0) for expert in range(experts)}
    for _ in range(tokens):
        expert = draw.choices(range(experts), weights)[0]
        for level in range(draw.randrange(levels) + 1):
            requests[expert][level] += 1
    return {e: {b: n for b, n in levels.items() if n} for e, levels in requests.items() if levels[0]}


def times(requests):
    """A plane takes half of the base's time to load; a level computes for the tokens that stop at it."""

    def compute(load):
        expert, level = load
        return 0.2 * (requests[expert][level] - requests[expert].get(level + 1, 0))

    return (lambda load: 1.0 if load[1] == 0 else 0.5), compute


def is_ordered(order):
    seen = {}
    for expert, level in order:
        if level < seen.get(expert, -1):
            return False
        seen[expert] = level
    return True


def optimum(requests):
    loads = by_expert(requests)
    return min(makespan(order, *times(requests)) for order in permutations(loads) if is_ordered(order))


def test_every_load_once_and_a_level_after_those_below_it():
    for seed in range(50):
        requests = trace(seed, experts=6)
        order = hottest_first(requests)
        assert sorted(order) == sorted(by_expert(requests)) and is_ordered(order)


def test_the_head_with_most_requests_is_next():
    assert hottest_first({0: {0: 2, 1: 2}, 1: {0: 5, 1: 1}, 2: {0: 1}}) == [
        (1, 0), (0, 0), (0, 1), (1, 1), (2, 0),
    ]  # fmt: skip


def test_near_the_optimum_and_before_the_plain_order():
    """Brute force over all orders of 3 experts with 2 levels and of 4 experts with up to 2."""
    reached, found, plain = [], [], []
    for seed in range(30):
        requests = trace(seed, experts=3 + seed % 2, levels=2)
        best, ours = optimum(requests), makespan(hottest_first(requests), *times(requests))
        assert ours >= best - 1e-9
        reached.append(abs(ours - best) < 1e-9)
        found.append(ours / best)
        plain.append(makespan(by_expert(requests), *times(requests)) / best)
    assert sum(found) < sum(plain) and sum(found) / 30 < 1.1
    assert any(reached)


def test_computation_waits_for_its_load():
    order = [(0, 0), (1, 0)]
    assert makespan(order, lambda _: 2.0, lambda _: 1.0) == 5.0
    assert makespan(order, lambda _: 1.0, lambda _: 3.0) == 7.0


def test_the_highest_planes_go_first_and_the_base_last():
    resident = {0: [0, 1, 2], 1: [0, 1], 2: [0]}
    size = {0: 2.0, 1: 1.0, 2: 1.0}.__getitem__
    assert evict(resident, 0, 9, size) == {0: 3, 1: 2, 2: 1}, "it fits: 9 bytes are in use"
    assert evict(resident, 1, 9, size) == {0: 2, 1: 2, 2: 1}
    assert evict(resident, 3, 9, size) == {0: 1, 1: 1, 2: 1}
    assert evict(resident, 9, 9, size) == {0: 0, 1: 0, 2: 0}
