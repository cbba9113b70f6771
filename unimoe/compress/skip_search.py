"""Finding the thresholds of :class:`unimoe.compress.skip.Thresholds`: quantiles of the scores, and MoDES's
search along the frontier of what skips enough.

Shapes: L MoE layers, T tokens, K slots of a token, M modalities, V vocabulary, A answer tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.model.configuration import MODALITIES
from unimoe.model.host_loss import last_hidden
from unimoe.moe.records import current_context
from unimoe.moe.view import MoEView

from .measure import Batches, Quality, Reference, measure
from .odp import Ratios
from .rows import modality_ids, real_tokens, rewritten
from .skip import Thresholds, drop
from .skip_rules import Rule

Place = tuple[int, ...]
"""An index into the grid of each threshold."""


def staircase(
    sizes: Sequence[int],
    ratio: Callable[[Place], float],
    cost: Callable[[Place], float],
    wanted: float,
) -> Place | None:
    """The cheapest place of a grid whose ratio is at least ``wanted``.

    MoDES's frontier search (arXiv 2511.15690, algorithm 1): over the last two thresholds, while the first of
    them ascends, the second one descends as far as the ratio allows. Both functions must not fall when an
    index grows; then the result is that of an exhaustive search, with at most the sum of both sizes of calls
    of ``ratio`` and one of ``cost`` for each step of the frontier, for each combination of the others.

    Args:
        sizes: number of values of each threshold, ascending; at least one.
        ratio: share of pairs that is skipped at a place.
        cost: what skipping costs there.
        wanted: least ratio.

    Returns:
        The place, or None if no place skips enough.
    """
    ratio, best = cache(ratio), None
    rows, columns = (1, *sizes)[-2:]
    flat = len(sizes) == 1
    for first in product(*map(range, sizes[:-2])):
        column = columns - 1
        previous = None
        for row in range(rows):

            def at(column: int, row: int = row, first: Place = first) -> Place:
                return (*first, column) if flat else (*first, row, column)

            if ratio(at(column)) < wanted:
                continue
            while column and ratio(at(column - 1)) >= wanted:
                column -= 1
            if column == previous:
                continue  # one row below skips enough at the same column, and costs no more
            previous = column
            found = cost(at(column))
            if best is None or found < best[0]:
                best = found, at(column)
    return None if best is None else best[1]


def grid(score_N: Tensor, size: int, most: float = 1.0) -> list[float]:
    """``size`` ascending thresholds: quantiles of the scores at equal steps from none to ``most`` of them.

    MoDES's own grid, 2 / (1 + exp(-10 (u - 1))), suits the scores of its models only.
    """
    ordered_N = score_N.float().sort().values
    shares = torch.linspace(0, most, size)
    places = (shares * len(ordered_N)).round().long().clamp(max=len(ordered_N))
    last = torch.nextafter(ordered_N[-1:], torch.tensor([torch.inf]))
    return [0.0, *torch.cat([ordered_N, last])[places[1:]].tolist()]


def skip_ratio(scores: Mapping[str, Tensor], tau: Mapping[str, float]) -> float:
    """Share of all pairs whose score is below the threshold of their group of tokens."""
    skipped = sum(float((score_N < tau[name]).sum()) for name, score_N in scores.items())
    return skipped / sum(len(score_N) for score_N in scores.values())


def layer_factors(kl_L: Sequence[float]) -> list[float]:
    """[L] MoDES's factors (arXiv 2511.15690, eq. 3): each layer's share of the divergences that skipping one
    whole layer causes; rounding below 0 counts as 0."""
    clean = [max(value, 0.0) for value in kl_L]
    total = sum(clean)
    return [value / total if total else 1 / len(clean) for value in clean]


@dataclass
class Routings:
    """What routers gave the real tokens of some batches."""

    scores: dict[int, list[list[Tensor]]]
    """Modality -> MoE layer -> weights of pairs, one tensor a forward pass."""
    ratios: list[list[Tensor]]
    """MoE layer -> weights of each token's experts behind its first over that of the first, one tensor a
    pass."""

    def of(self, modalities: Sequence[int], factors: Mapping[int, Sequence[float]], power: float) -> Tensor:
        """[N] scores of all pairs of some modalities: weights times their layers' factors to a power."""
        found = []
        for modality in modalities:
            for layer, weights in enumerate(self.scores[modality]):
                factor = factors[modality][layer] ** power if power else 1.0
                found += [weight_N * factor for weight_N in weights]
        return torch.cat(found)


@torch.no_grad()
def see(model: Any, layers: Sequence[MoEView], batches: Batches) -> Routings:
    """The routings of a model, without its own rule."""
    seen = Routings({}, [[] for _ in layers])

    def look(layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        real_T = real_tokens(current_context(), len(weight_TK), weight_TK.device)
        modality_T = modality_ids(current_context(), len(weight_TK), weight_TK.device)
        for modality in modality_T[real_T].unique().tolist():
            chosen_T = real_T & (modality_T == modality)
            pairs_TK = chosen_T[:, None] & (index_TK < layer.num_experts)
            rows = seen.scores.setdefault(modality, [[] for _ in layers])
            rows[layer.index].append(weight_TK[pairs_TK].float().cpu())
        sorted_TK, order_TK = weight_TK[real_T].float().sort(dim=1, descending=True, stable=True)
        behind_TK = index_TK[real_T].gather(1, order_TK) < layer.num_experts
        behind_TK[:, 0] = False
        ratio_TK = sorted_TK / sorted_TK[:, :1].clamp(min=1e-20)
        seen.ratios[layer.index].append(ratio_TK[behind_TK].cpu())
        return index_TK, weight_TK

    with rewritten(layers, look):
        for of_domain in batches.values():
            for batch in of_domain:
                last_hidden(model, batch)
    return seen


class Counted:
    """A rule as a rewriting that counts what it skips, padding left out."""

    def __init__(self, rule: Rule, layers: int):
        self.rule, self.layers = rule, layers
        self.skipped: dict[int, int] = {}
        self.pairs: dict[int, int] = {}

    def __call__(
        self, layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        before_TK = index_TK < layer.num_experts
        index_TK, weight_TK = self.rule.apply(layer, self.layers, x_TD, index_TK, weight_TK)
        gone_TK = before_TK & (index_TK >= layer.num_experts)
        real_T = real_tokens(current_context(), len(weight_TK), weight_TK.device)
        modality_T = modality_ids(current_context(), len(weight_TK), weight_TK.device)
        for modality in modality_T[real_T].unique().tolist():
            chosen_T = real_T & (modality_T == modality)
            for counts, mask_TK in ((self.skipped, gone_TK), (self.pairs, before_TK)):
                counts[modality] = counts.get(modality, 0) + int(mask_TK[chosen_T].sum())
        return index_TK, weight_TK

    def ratio(self, modalities: Sequence[int] | None = None) -> float:
        """Share of the pairs that was skipped, of some modalities or of all."""
        chosen = self.pairs if modalities is None else [one for one in modalities if one in self.pairs]
        return sum(self.skipped[one] for one in chosen) / max(sum(self.pairs[one] for one in chosen), 1)


@dataclass
class Found:
    """A rule, and what it costs on the data it was found with."""

    rule: Rule
    quality: dict[str, Quality]
    """Quality by domain."""
    counted: Counted
    tried: int = 0
    """Measured places of the search."""

    @property
    def worst(self) -> float:
        """The largest divergence of a domain."""
        return max(one.kl for one in self.quality.values())


def cost_of(
    rule: Rule, model: Any, layers: Sequence[MoEView], original: Reference, batches: Batches
) -> Found:
    """Measure a rule."""
    counted = Counted(rule, len(layers))
    with rewritten(layers, counted):
        return Found(rule, measure(model, original, batches), counted)


def find_thresholds(
    model: Any,
    layers: Sequence[MoEView],
    original: Reference,
    batches: Batches,
    ratio: float,
    by_modality: bool = True,
    power: float = 0.0,
    size: int = 10,
    keep_sum: bool = False,
) -> Found:
    """The thresholds that skip at least a share of the pairs at the least cost: the largest divergence of a
    domain (MoDES has one domain, and takes its mean).

    The share is counted on the routings of the model as it is; skipping in early layers moves later ones a
    little.

    Args:
        model: a mixture of experts.
        layers: its MoE layers.
        original: :func:`unimoe.compress.measure.reference` of the model without its own rule.
        batches: the data of ``original``.
        ratio: least share of pairs to skip.
        by_modality: one threshold for text and one for all media, else one for all: the control.
        power: of the layers' factors, which cost two measurements a layer; 0 does without.
        size: values of each threshold that are tried.
        keep_sum: scale the weights that are left to the sum of all.

    Raises:
        UserError: no thresholds skip so much.
    """
    seen = see(model, layers, batches)
    present = sorted(seen.scores)
    media = [one for one in present if one]
    groups = [[0], media] if by_modality and media and 0 in present else [present]
    factors = {one: [1.0] * len(layers) for one in present}
    if power:
        for group in groups:
            shares = layer_factors(
                [_without(model, layers, original, batches, layer, group) for layer in layers]
            )
            factors |= dict.fromkeys(group, shares)
    scores = {str(place): seen.of(group, factors, power) for place, group in enumerate(groups)}
    grids = [grid(score_N, size) for score_N in scores.values()]

    def rule(place: Place) -> Thresholds:
        tau = {
            MODALITIES[one]: grids[index][place[index]] for index, group in enumerate(groups) for one in group
        }
        alpha = {MODALITIES[one]: factors[one] for one in present} if power else {}
        return Thresholds(tau, alpha, power if alpha else 1.0, keep_sum)

    def skipped(place: Place) -> float:
        return skip_ratio(scores, {str(index): grids[index][at] for index, at in enumerate(place)})

    measured: dict[Place, Found] = {}

    def cost(place: Place) -> float:
        measured[place] = cost_of(rule(place), model, layers, original, batches)
        return measured[place].worst

    best = staircase([size] * len(groups), skipped, cost, ratio)
    if best is None:
        raise UserError(f"--ratio is {ratio}, expected at most 1: no thresholds skip that much")
    found = measured[best]
    found.tried = len(measured)
    return found


def find_ratios(
    model: Any,
    layers: Sequence[MoEView],
    original: Reference,
    batches: Batches,
    ratio: float,
    blocks: int = 0,
) -> Found:
    """ODP's rule at a share of skipped pairs: mu of each layer is one quantile of the weights behind each
    token's first, over that of the first. The median, as published, skips a quarter of all pairs of a top-2
    model.

    Args:
        model, layers, original, batches, ratio: as of :func:`find_thresholds`.
        blocks: only in so many layers, those whose loss as a whole costs least (the released code takes 10);
            0 for all.

    Raises:
        UserError: a token visits one expert, or so many layers cannot skip that much.
    """
    if min(layer.top_k for layer in layers) < 2:
        raise UserError("--how odp: a token visits one expert, expected a router of at least two")
    seen = see(model, layers, batches)
    chosen = list(range(len(layers)))
    if blocks:
        present = sorted(seen.scores)
        costs = [_without(model, layers, original, batches, layer, present) for layer in layers]
        chosen = sorted(chosen, key=costs.__getitem__)[:blocks]
    behind = [torch.cat(one).sort().values for one in seen.ratios]
    pairs = sum(len(weight_N) for rows in seen.scores.values() for row in rows for weight_N in row)
    share = ratio * pairs / max(sum(len(behind[index]) for index in chosen), 1)
    if not 0 <= share <= 1:
        raise UserError(
            f"--ratio is {ratio}, which {len(chosen)} layers cannot skip behind their first experts"
        )
    mu = [0.0] * len(layers)
    for index in chosen:
        place = round(share * len(behind[index]))
        mu[index] = 2.0 if place >= len(behind[index]) else float(behind[index][place])
    return cost_of(Ratios(mu), model, layers, original, batches)


def _without(
    model: Any,
    layers: Sequence[MoEView],
    original: Reference,
    batches: Batches,
    skipped: MoEView,
    modalities: Sequence[int],
) -> float:
    """The largest divergence of a domain where tokens of some modalities skip one whole layer.

    A skipped token's output is 0. In the released code of MoDES it is the layer's normalised input, which the
    residual stream then holds twice.
    """

    def fn(layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        if layer.index != skipped.index:
            return index_TK, weight_TK
        modality_T = modality_ids(current_context(), len(weight_TK), weight_TK.device)
        gone_T = torch.isin(modality_T, torch.tensor(modalities, device=modality_T.device))
        return drop(index_TK, weight_TK, gone_T[:, None].expand_as(index_TK), layer.num_experts)

    with rewritten(layers, fn):
        return max(one.kl for one in measure(model, original, batches).values())
