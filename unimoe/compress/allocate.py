"""Choosing bits under a budget, by an integer program (Mixture Compressor, arXiv 2410.06270, eq. 5).

Shapes: U units (experts), C choices (numbers of bits).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from unimoe.errors import UserError


def allocate(
    cost_UC: np.ndarray,
    price_UC: np.ndarray,
    budget: float,
    layer_U: Sequence[int] | None = None,
    at_least: Mapping[int, int] | None = None,
) -> list[int]:
    """The choice of each unit with the least total cost and at most ``budget`` of total price.

    Args:
        cost_UC: what each choice of each unit costs in quality.
        price_UC: what it takes of the budget, such as bits times weights.
        budget: of all units together.
        layer_U: the layer of each unit, for ``at_least``; default all the same.
        at_least: choice -> number of units of every layer that must take it; the published program has
            one expert of 3 bits and one of 2 bits.

    Raises:
        UserError: no choice fits into the budget.
    """
    units, choices = cost_UC.shape
    row = np.repeat(np.arange(units), choices)
    one_choice = coo_array((np.ones(units * choices), (row, np.arange(units * choices))))
    constraints = [LinearConstraint(one_choice, 1, 1), LinearConstraint(price_UC.reshape(1, -1), ub=budget)]
    layers = np.zeros(units, int) if layer_U is None else np.asarray(layer_U)
    for choice, number in (at_least or {}).items():
        for layer in np.unique(layers):
            taken = np.zeros((units, choices))
            taken[layers == layer, choice] = 1
            constraints.append(LinearConstraint(taken.reshape(1, -1), lb=number))
    scale = np.abs(cost_UC).max() or 1.0  # HiGHS has absolute tolerances
    found = milp(
        cost_UC.reshape(-1) / scale,
        integrality=np.ones(units * choices),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-9},
    )
    if found.x is None:
        least = price_UC.min(1).sum()
        raise UserError(
            f"no choice of bits fits into the budget of {budget:g}: the cheapest takes {least:g}"
            + (f", and each layer needs {dict(at_least)} (choice: units)" if at_least else "")
        )
    return found.x.reshape(units, choices).argmax(1).tolist()
