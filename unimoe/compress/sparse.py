"""STUN's second stage: single weights of the experts that are left become zero.

Shapes: E experts, O rows and K columns of a matrix, D hidden, I inner width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.view import MoEView

from .watch import Stats


def second_stage(total: float, first: float) -> float:
    """Sparsity of what is left so that ``total`` of all weights are gone after ``first`` went with experts:
    1 - (1 - s) / (1 - s_1) (STUN, arXiv 2409.06211, section 5).

    Raises:
        UserError: more went already, or a share is out of range.
    """
    if not 0 <= first <= total < 1:
        raise UserError(f"a sparsity of {total} cannot follow one of {first}, expected {first}..1")
    return 1 - (1 - total) / (1 - first)


def wanda_mask(weight_OK: Tensor, norm_K: Tensor, sparsity: float) -> Tensor:
    """[O, K] bool, True for the weights of each row with the smallest |W| |X|_2, ``sparsity`` of a row
    (Wanda, arXiv 2306.11695, eq. 1)."""
    gone = int(weight_OK.shape[1] * sparsity)
    index_OX = (weight_OK.abs() * norm_K).topk(gone, dim=1, largest=False).indices
    return torch.zeros_like(weight_OK, dtype=torch.bool).scatter(1, index_OX, True)


def owl_sparsity(
    scores: Sequence[Tensor], sparsity: float, factor: float = 5.0, spread: float = 0.08
) -> list[float]:
    """Sparsity of each layer: layers with more outliers, scores above ``factor`` times their mean, keep more;
    at most ``spread`` from the mean, which is ``sparsity`` (OWL, arXiv 2310.05175, section 3.2)."""
    shares = torch.tensor([float((one > factor * one.mean()).float().mean()) for one in scores])
    width = float(shares.max() - shares.min())
    if width == 0:
        return [sparsity] * len(scores)
    scaled = (shares - shares.min()) / width * 2 * spread
    return [min(max(float(one), 0.0), 0.99) for one in sparsity - (scaled - scaled.mean())]


@torch.no_grad()
def sparsify(
    layers: Sequence[MoEView], stats: Stats, sparsity: float, owl: bool = False, least: int = 32
) -> list[tuple[int, int, int]]:
    """Zero a share of the weights of every expert, in place, by Wanda; with ``owl`` another in each layer.

    Returns:
        ``(layer, expert, tokens)`` of experts that saw fewer than ``least`` tokens: by magnitude alone.

    Raises:
        UserError: statistics without ``x_sq`` and ``inner_sq``.
    """
    if missing := {"x_sq", "inner_sq"} - stats.values.keys():
        raise UserError(f"a sparsity needs the statistic {sorted(missing)[0]!r} of `unimoe compress stats`")
    shares = [sparsity] * len(layers)
    if owl:
        scores = [
            torch.cat([(matrix.abs() * norm).flatten() for matrix, norm in _matrices(layer, stats, place, 0)])
            for place, layer in enumerate(layers)
        ]
        shares = owl_sparsity(scores, sparsity)
    for place, layer in enumerate(layers):
        for matrix, norm_K in _matrices(layer, stats, place, least):
            matrix.masked_fill_(wanda_mask(matrix, norm_K, shares[place]), 0)
    return stats.starved(least)


def _matrices(layer: MoEView, stats: Stats, place: int, least: int) -> list[tuple[Tensor, Tensor]]:
    """Every matrix of a layer's experts and the norm of each of its inputs [K]; ones for starved experts."""
    found = []
    for expert in range(layer.num_experts):
        starved = float(stats.values["count"][place][expert]) < least
        for name, matrix in layer.expert(expert).items():
            norm_K = stats.values["inner_sq" if name == "down" else "x_sq"][place][expert].sqrt().to(matrix)
            found.append((matrix, torch.ones_like(norm_K) if starved else norm_K))
    return found
