"""Choice of the experts that stay, by their scores.

Shapes: E experts of a layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.view import MoEView

from .plan import least_by_group
from .scores import Scores


def top_m(layers: Sequence[MoEView], scores: Scores, keep: int) -> list[list[int]]:
    """The ``keep`` best experts of each layer, in their order; as many of each group of a group-limited
    router, whole FFNs of a sliced one.

    Raises:
        UserError: fewer than 1, more than there are, or no multiple of the groups or slices.
    """
    kept = []
    for layer, score_E in zip(layers, scores, strict=True):
        units = _units(layer, score_E)
        size = len(units[0][1])
        if not 1 <= keep <= layer.num_experts or keep % size:
            of = f", a multiple of {size} (its groups or slices)" if size > 1 else ""
            raise UserError(
                f"{keep} experts are to be kept, expected 1..{layer.num_experts}{of} in {layer.name}"
            )
        kept.append(sorted(expert for _, unit in units[: keep // size] for expert in unit))
    return kept


def global_top(layers: Sequence[MoEView], scores: Scores, total: int) -> list[list[int]]:
    """The ``total`` best experts of the whole model, so that layers keep different numbers: at least as many
    as a token visits. Scores of a layer are compared as shares of the layer's sum.

    Raises:
        UserError: the layers need more experts than that, or have fewer.
    """
    units = [
        _units(layer, score / score.sum().clamp(min=1e-20))
        for layer, score in zip(layers, scores, strict=True)
    ]
    least = [
        least_by_group(layer) if layer.groups > 1 else -(-layer.top_k // len(of[0][1]))
        for layer, of in zip(layers, units, strict=True)
    ]
    needed = sum(count * len(of[0][1]) for count, of in zip(least, units, strict=True))
    there = sum(layer.num_experts for layer in layers)
    if not needed <= total <= there:
        raise UserError(
            f"{total} experts are to be kept in all, expected {needed}..{there}: each layer needs as many as "
            "a token visits"
        )
    kept = [
        [expert for _, unit in of[:count] for expert in unit] for of, count in zip(units, least, strict=True)
    ]
    rest = [
        (score, place, unit)
        for place, (of, count) in enumerate(zip(units, least, strict=True))
        for score, unit in of[count:]
    ]
    left = total - needed
    for _, place, unit in sorted(rest, key=lambda one: -one[0]):
        if len(unit) <= left:
            kept[place] += unit
            left -= len(unit)
    return [sorted(one) for one in kept]


def _units(layer: MoEView, score_E: Tensor) -> list[tuple[float, list[int]]]:
    """Experts that stay or go together with their score, best first."""
    experts, router = layer.num_experts, layer.router
    members: list[list[int]]
    if layer.groups > 1:  # the best of each group, the second of each, ...
        order_GX = score_E.reshape(layer.groups, -1).sort(dim=1, descending=True).indices
        first_G1 = torch.arange(layer.groups)[:, None] * (experts // layer.groups)
        members = (order_GX + first_G1).T.tolist()
    elif getattr(router, "groups", None) == "slices":
        slices: Any = layer.block.slices
        members = [[copy * slices + one for one in range(slices)] for copy in range(experts // slices)]
    else:
        members = [[expert] for expert in range(experts)]
    scored = [(float(score_E[unit].sum()), unit) for unit in members]
    return sorted(scored, key=lambda one: -one[0])  # stable: of equals the first
