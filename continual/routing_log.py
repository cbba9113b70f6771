"""Routing of the banks by block of the decoder: shares of token types, target of the losses, mass of each
bank, drift.

Shapes: O blocks (layers of the decoder) that have routers, B banks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.training.ranks import mean_over_ranks

from .guidance import Observation


def by_block(seen: Mapping[int, Observation], types: Sequence[str]) -> dict[str, Any]:
    """Observations of each block as means over its tokens and projections.

    Returns:
        ``blocks`` (their indices), ``mass`` [O][B] (rows sum to 1) and, where a task after the first is
        trained, ``types`` (name -> [O]) and the target of the losses, ``target_mean`` and ``target_std`` [O].
        Empty without observations.
    """
    if not seen:
        return {}
    order = sorted(seen)
    log: dict[str, Any] = {
        "blocks": order,
        "mass": [_plain(seen[block].mass / seen[block].tokens) for block in order],
    }
    types_O3 = torch.stack([seen[block].types for block in order])
    if bool((types_O3.sum(-1) > 0).all()):
        shares_O3 = types_O3 / types_O3.sum(-1, keepdim=True)
        log["types"] = {name: _plain(shares_O3[:, number]) for number, name in enumerate(types)}
        sum_O, squares_O, tokens_O = torch.stack([seen[block].target for block in order]).unbind(-1)
        mean_O = sum_O / tokens_O
        log["target_mean"] = _plain(mean_O)
        log["target_std"] = _plain((squares_O / tokens_O - mean_O.square()).clamp(min=0).sqrt())
    return log


def over_ranks(seen: Mapping[int, Observation], device: torch.device) -> dict[int, Observation]:
    """Mean of the ranks' observations; every rank calls it, each with the same blocks."""
    if not seen:
        return {}
    rows = [
        torch.cat([torch.tensor([float(one.tokens)]), one.types, one.target, one.mass])
        for one in seen.values()
    ]
    mean = mean_over_ranks(torch.stack(rows).to(device)).cpu()
    return {
        block: Observation(float(row[0]), row[1:4], row[7:], row[4:7])
        for block, row in zip(seen, mean, strict=True)
    }


def drift(mass: Sequence[Sequence[float]], task: int) -> list[float]:
    """drift_j(t) of each block: share of the routing mass of task j's tokens on banks of later tasks."""
    return [round(sum(row[task + 1 :]), 5) for row in mass]


def _plain(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
