"""What routers did, by block of the decoder: shares of token types, the losses' target, mass of each bank,
drift.

Shapes: O blocks (layers of the decoder) that have routers, B banks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.moe.lora_linear import block_of
from unimoe.training.ranks import mean_over_ranks

from .guidance import Observation


def by_block(seen: Mapping[str, Observation], types: Sequence[str]) -> dict[str, Any]:
    """Observations of single routers as means over the tokens and projections of each block.

    Returns ``blocks`` (their indices), ``mass`` [O][B] (rows sum to 1) and, where a task after the first was
    learned, ``types`` (name -> [O]) and the losses' target, ``target_mean`` and ``target_std`` [O].
    """
    blocks: dict[int, list[Observation]] = {}
    for name, one in seen.items():
        blocks.setdefault(block_of(name), []).append(one)
    if not blocks:
        return {}
    order = sorted(blocks)
    mass = [_total(blocks[b], "mass") / sum(one.tokens for one in blocks[b]) for b in order]
    log: dict[str, Any] = {"blocks": order, "mass": [_plain(row_B) for row_B in mass]}
    types_O3 = torch.stack([_total(blocks[b], "types") for b in order])
    if bool((types_O3.sum(-1) > 0).all()):
        shares_O3 = types_O3 / types_O3.sum(-1, keepdim=True)
        log["types"] = {name: _plain(shares_O3[:, number]) for number, name in enumerate(types)}
        sum_O, squares_O, tokens_O = torch.stack([_total(blocks[b], "target") for b in order]).unbind(-1)
        mean_O = sum_O / tokens_O
        log["target_mean"] = _plain(mean_O)
        log["target_std"] = _plain((squares_O / tokens_O - mean_O.square()).clamp(min=0).sqrt())
    return log


def over_ranks(seen: Mapping[str, Observation], device: torch.device) -> dict[str, Observation]:
    """What the ranks saw on average; every rank calls it, each with the same routers."""
    if not seen:
        return {}
    rows = [
        torch.cat([torch.tensor([float(one.tokens)]), one.types, one.target, one.mass])
        for one in seen.values()
    ]
    mean = mean_over_ranks(torch.stack(rows).to(device)).cpu()
    return {
        name: Observation(float(row[0]), row[1:4], row[7:], row[4:7])
        for name, row in zip(seen, mean, strict=True)
    }


def drift(mass: Sequence[Sequence[float]], task: int) -> list[float]:
    """drift_j(t) of each block: share of the routing mass of task j's tokens that is on banks of later
    tasks."""
    return [round(sum(row[task + 1 :]), 5) for row in mass]


def _total(observations: Sequence[Observation], name: str) -> Tensor:
    return torch.stack([getattr(one, name) for one in observations]).sum(0)


def _plain(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
