import numpy as np
import pytest

from unimoe.compress.allocate import allocate
from unimoe.errors import UserError

BITS = np.array([1, 2, 3])


def exhaustive(cost, price, budget, layers=None, at_least=None):
    """The least total cost of all C^U choices."""
    units, choices = cost.shape
    all_NU = np.indices((choices,) * units).reshape(units, -1).T
    fits_N = price[np.arange(units), all_NU].sum(1) <= budget
    for one, number in (at_least or {}).items():
        for layer in set(layers):
            fits_N &= (all_NU[:, np.array(layers) == layer] == one).sum(1) >= number
    return cost[np.arange(units), all_NU].sum(1)[fits_N].min()


def total(cost, choice):
    return cost[np.arange(len(cost)), choice].sum()


@pytest.mark.parametrize("seed", range(3))
def test_equals_exhaustive_search(seed):
    random = np.random.default_rng(seed)
    cost = np.sort(random.exponential(size=(8, 3)))[:, ::-1]
    price = np.tile(BITS, (8, 1))
    for budget in (12, 16, 20):
        choice = allocate(cost, price, budget)
        assert price[np.arange(8), choice].sum() <= budget
        assert total(cost, choice) == pytest.approx(exhaustive(cost, price, budget))


def test_units_of_different_sizes_and_bounds_by_layer_equal_exhaustive_search():
    random = np.random.default_rng(0)
    cost = np.sort(random.exponential(size=(8, 3)))[:, ::-1]
    price = BITS * random.integers(1, 4, (8, 1))
    layers, at_least = [0, 0, 0, 0, 1, 1, 1, 1], {2: 1, 1: 1}
    budget = 2 * price[:, 0].sum()
    choice = allocate(cost, price, budget, layers, at_least)
    assert total(cost, choice) == pytest.approx(exhaustive(cost, price, budget, layers, at_least))
    for layer in (0, 1):
        own = [one for one, where in zip(choice, layers, strict=True) if where == layer]
        assert 1 in own and 2 in own


def test_one_program_over_all_layers_is_not_worse_than_one_a_layer():
    random = np.random.default_rng(1)
    cost = np.sort(random.exponential(size=(12, 3)) * random.choice([0.1, 10], (12, 1)))[:, ::-1]
    price = np.tile(BITS, (12, 1))
    apart = sum(total(cost[i : i + 4], allocate(cost[i : i + 4], price[:4], 8)) for i in (0, 4, 8))
    assert total(cost, allocate(cost, price, 24)) <= apart + 1e-9


def test_the_size_of_the_costs_does_not_matter():
    cost = np.sort(np.random.default_rng(2).exponential(size=(10, 3)))[:, ::-1]
    price = np.tile(BITS, (10, 1))
    assert allocate(cost * 1e-9, price, 20) == allocate(cost, price, 20) == allocate(cost * 1e9, price, 20)


def test_a_budget_that_cannot_be_met_is_one_line():
    with pytest.raises(UserError, match=r"budget of 7: the cheapest takes 8") as error:
        allocate(np.ones((8, 3)), np.tile(BITS, (8, 1)), 7)
    assert "\n" not in str(error.value)
