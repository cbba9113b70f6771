import numpy as np
import pytest

from unimoe.continual.theory.linear_model import (
    World,
    exact_errors,
    sampled_errors,
    simulate,
)
from unimoe.errors import UserError


def truths(tasks=4, dimensions=12):
    return np.random.default_rng(0).standard_normal((tasks, dimensions))


def one_expert_errors(truth_Nd, s, T):
    """E F_T and E G_T of a single expert when every n_t is uniform, in closed form."""
    N, d = truth_Nd.shape
    r = 1 - s / d
    size = (truth_Nd**2).sum(-1).mean()
    spread = ((truth_Nd[:, None] - truth_Nd[None]) ** 2).sum() / N**2
    t = np.arange(1, T)
    F = (r**T - r**t) * size + spread * ((1 - r) * (1 - r ** (T - t)) + r**t - r**T)
    t = np.arange(1, T + 1)
    G = r**T * size + spread * (1 - r**T - (1 - r) * r ** (T - t)).mean()
    return F.sum() / (T - 1), G


def test_one_update_by_hand():
    """w = 0, half of the dimensions seen: half of the error goes, and half of the other task's pull comes."""
    truth = np.array([[2.0, 0.0], [0.0, 1.0]])
    errors = exact_errors(np.array([0, 0]), np.array([0, 1]), truth, 1)
    first = 0.5 * 4  # right after round 1, on task 0
    second = 0.5 * (0.5 * 1 + 0.5 * 5) + 0  # after round 2, on task 1: r (r 1 + (1-r) 5) + (1-r) 0
    first_later = 0.5 * first + 0.5 * 5
    np.testing.assert_allclose(errors.G_T, [first, (first_later + second) / 2])
    np.testing.assert_allclose(errors.F_T[1], first_later - first)


def test_monte_carlo_is_within_three_standard_errors_at_every_point():
    generator = np.random.default_rng(3)
    expert, task = generator.integers(0, 3, 20), generator.integers(0, 4, 20)
    exact = exact_errors(expert, task, truths(), 5)
    mean, error = sampled_errors(expert, task, truths(), 5, runs=4000, seed=1)
    assert np.all(np.abs(mean.G_T - exact.G_T) <= 3 * error.G_T + 1e-12)
    assert np.all(np.abs(mean.F_T - exact.F_T)[1:] <= 3 * error.F_T[1:] + 1e-12)


def test_one_expert_in_closed_form():
    generator = np.random.default_rng(0)
    last = [exact_errors(np.zeros(12, int), generator.integers(0, 4, 12), truths(), 5) for _ in range(3000)]
    F, G = one_expert_errors(truths(), 5, 12)
    for values, expected in (([e.F_T[-1] for e in last], F), ([e.G_T[-1] for e in last], G)):
        assert abs(np.mean(values) - expected) < 3 * np.std(values) / len(values) ** 0.5


def test_a_stopped_gate_generalises_and_one_that_never_stops_does_not():
    world = World(rounds=500)
    single, _ = simulate(world, 1, "never", 10)
    stopped, when = simulate(world, 5, "exploration", 10)
    never, _ = simulate(world, 5, "never", 10)
    assert (when == 10).all()  # ceil(M / eta)
    assert stopped.G_T[-1] < 0.95 * single.G_T[-1]
    assert never.G_T[-1] > 0.95 * single.G_T[-1]


def test_too_many_samples():
    with pytest.raises(UserError, match="0 < samples < dimensions"):
        exact_errors(np.array([0]), np.array([0]), truths(), 12)
