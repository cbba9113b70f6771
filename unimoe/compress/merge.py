"""Fewer experts out of alike ones: STUN's representatives and means, Sub-MoE's weighted means.

Shapes: E experts of a layer, m tokens, D hidden, O rows and I columns of a matrix, r rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from unimoe.moe.view import MoEView

from .cluster import Groups, bisect_clusters, representatives, router_distance
from .structure import merge_rows
from .watch import Seen, run_experts, watch


@torch.no_grad()
def stun(
    layers: Sequence[MoEView],
    total: int,
    cosel: Sequence[Tensor] | None = None,
    l1: float = 1.0,
    l2: float = 0.0,
    kappa: int = 2,
) -> list[list[int]]:
    """Stage 1 of STUN (arXiv 2409.06211, section 4): ``total`` clusters over all layers, each left with one
    expert. That is the member closest to the cluster's mean with its own row of the router; in a layer with
    at most ``kappa`` clusters it becomes the mean of its members, and its row the mean row (as released; a
    note gives the paper's kappa as 3, exclusive).

    Changes the weights of such layers in place.

    Returns:
        The experts that stay, by layer: a plan's ``keep``.
    """
    rows = [layer.router_rows()[: layer.num_experts] for layer in layers]
    co = cosel if cosel is not None else [None] * len(layers)
    distances = [router_distance(row, one, l1, l2) for row, one in zip(rows, co, strict=True)]
    kept = []
    for layer, groups in zip(layers, bisect_clusters(distances, total)[1], strict=True):
        stacks = layer.stacks()
        flat = [
            torch.cat([stack[expert].flatten() for stack in stacks.values()]) for expert in range(len(groups))
        ]
        stay = representatives(flat, groups)
        if max(groups) + 1 <= kappa:
            for stack in (*stacks.values(), layer.router_rows()):
                means = merge_rows(stack[: len(groups)], groups)
                for expert in stay:
                    stack[expert] = means[groups[expert]]
        kept.append(stay)
    return kept


@contextmanager
def all_outputs(layers: Sequence[MoEView], most: int, passes: int = 1) -> Iterator[list[Tensor]]:
    """Inside, forward passes fill for each layer [E, m, D]: the outputs of all experts for the same m tokens,
    without padding (Sub-MoE's calibration).

    Args:
        layers: of one model.
        most: m at most.
        passes: forward passes to come; each gives its share of m at most, evenly spaced over its tokens.
    """
    share = -(-most // passes)
    found = [torch.zeros(layer.num_experts, 0, 0) for layer in layers]
    place = {layer.index: position for position, layer in enumerate(layers)}

    def add(seen: Seen) -> None:
        at = place[seen.layer.index]
        room = min(share, most - found[at].shape[1])
        tokens, first_T = seen.token_N.unique(return_inverse=True)
        pair_T = torch.zeros_like(tokens).scatter(
            0, first_T, torch.arange(len(first_T), device=tokens.device)
        )
        pair_T = pair_T[seen.real_T[tokens]]
        if not len(pair_T) or room < 1:
            return
        spaced_m = torch.arange(min(room, len(pair_T)), device=pair_T.device) * len(pair_T)
        x_mD = seen.x_ND[pair_T[spaced_m // min(room, len(pair_T))]]
        experts = seen.layer.num_experts
        expert_N = torch.arange(experts, device=x_mD.device).repeat_interleave(len(x_mD))
        y_ND = run_experts(seen.layer, x_mD.repeat(experts, 1), expert_N)[0]
        y_EmD = y_ND.unflatten(0, (experts, -1)).float().cpu()
        found[at] = y_EmD if not found[at].numel() else torch.cat([found[at], y_EmD], dim=1)

    with watch(layers, add):
        yield found


def truncate(
    stack: Tensor,
    groups: Groups,
    weight_E: Tensor,
    rank: int,
    whitening: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Sub-MoE-dagger: [E, O, I] -> for each cluster the factors U_r [O, r] and U_r^T mean [r, I] of the
    weighted mean, U the left singular vectors of the members side by side, [W_1 S_1, ..., W_n S_n], with S_i
    the Cholesky factor of the member's input moments where ``whitening`` is given (section 3.4; the paper
    prints both orders of concatenation, only this one shares U).

    Returns:
        A list of pairs; their product is the merged matrix of rank r, and at full rank the mean itself.
    """
    means, factors = merge_rows(stack, groups, weight_E), []
    for cluster in range(max(groups) + 1):
        members = [expert for expert, of in enumerate(groups) if of == cluster]
        side = [stack[one] if whitening is None else stack[one] @ whitening[one] for one in members]
        U_Or = torch.linalg.svd(torch.cat(side, dim=1).to(means.dtype), full_matrices=False).U[:, :rank]
        factors.append((U_Or, U_Or.T @ means[cluster]))
    return factors
