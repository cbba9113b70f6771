"""Losses that even the load of the experts: over the global batch, over each sample, over devices.

With uniform probabilities they are 1 whatever the load is, so they say nothing about the load: measure
that with ``expert_load``.

Shapes: T tokens, E experts, L layers, S samples, G devices. Padding tokens count nowhere.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.load_counts import ExpertLoad, expert_load
from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, across_layers, alone


@LOSSES.register(
    "balance",
    source="Switch Transformer, arXiv 2101.03961, eq. 4; DeepSeekMoE, arXiv 2401.06066, eq. 12-14",
    axis="load balance",
)
def load_balance(
    records: Sequence[LayerRecord], layers: Mapping[int, Any] | None = None, across: Across = alone
) -> Tensor:
    """Load-balance loss E * sum_i f_i P_i; 1 at uniform routing, differentiable in P.

    f is the share of the pairs and P the mean probability of an expert, both over the batches of all
    processes (global-batch balance, arXiv 2501.11873).

    Returns:
        [L]. Zero where every token is padding.
    """
    if not records:
        return torch.zeros(0)
    losses = [len(share_E) * (share_E * mean_E).sum() for share_E, mean_E in _means(records, across)]
    return torch.stack(losses)


@LOSSES.register(
    "device_balance", source="DeepSeekMoE, arXiv 2401.06066, eq. 15-17", axis="load balance, by device"
)
def device_balance(
    records: Sequence[LayerRecord],
    layers: Mapping[int, Any] | None = None,
    across: Across = alone,
    devices: int = 2,
) -> Tensor:
    """E * sum over devices of (mean f of its experts) * (sum of their P); 1 at uniform routing: [L].

    f and P as of :func:`load_balance`, which it is with one expert on each device.

    Args:
        records: of the layers.
        layers: not read.
        across: mean over processes.
        devices: G; neighbouring experts share one, as in expert parallelism.

    Raises:
        UserError: the experts cannot be divided evenly.
    """
    losses = []
    for share_E, mean_E in _means(records, across):
        if len(share_E) % devices:
            found = f"moe.losses.device_balance.devices is {devices}"
            raise UserError(f"{found}, expected a divisor of {len(share_E)} (the experts)")
        share_GX, mean_GX = share_E.unflatten(0, (devices, -1)), mean_E.unflatten(0, (devices, -1))
        losses.append(len(share_E) * (share_GX.mean(1) * mean_GX.sum(1)).sum())
    return torch.stack(losses)


@LOSSES.register(
    "sequence_balance", source="DeepSeek-V3, arXiv 2412.19437, eq. 17-20", axis="load balance, by sample"
)
def sequence_balance(
    records: Sequence[LayerRecord], layers: Mapping[int, Any] | None = None, across: Across = alone
) -> Tensor:
    """Mean over samples of E * sum_i f_i P_i, f and P those of one sample's tokens: [L].

    f counts the experts that were visited; DeepSeek-V3 counts those of the largest scores, before its
    selection bias. Where the context knows no samples, all tokens of a batch are one.
    """
    totals, samples = zip(*(_by_sample(one) for one in records), strict=True)
    return across(torch.stack(totals)) / across(torch.stack(samples)).clamp(min=1e-9)


def _by_sample(record: LayerRecord) -> tuple[Tensor, Tensor]:
    """Sum over samples of one layer's loss, and their number: 0-d each."""
    probs_TE, sample_T = record.routing.probs_TE, record.ctx.sample_T
    real_T1 = (
        torch.ones_like(probs_TE[:, :1]) if record.real_T is None else record.real_T[:, None].to(probs_TE)
    )
    row_T = torch.zeros_like(real_T1[:, 0], dtype=torch.int64)
    if sample_T is not None:
        _, row_T = sample_T.unique(return_inverse=True)
    zeros_SE = torch.zeros_like(probs_TE)  # no more samples than tokens
    pairs_SE = zeros_SE.index_add(0, row_T, record.routing.chosen() * real_T1)
    total_SE = zeros_SE.index_add(0, row_T, probs_TE * real_T1)
    tokens_S = zeros_SE[:, 0].index_add(0, row_T, real_T1[:, 0])
    mean_SE = total_SE / tokens_S[:, None].clamp(min=1)
    losses_S = probs_TE.shape[1] * (ExpertLoad(pairs_SE).share * mean_SE).sum(dim=1)
    return losses_S.sum(), (tokens_S > 0).sum().to(losses_S)


def _means(records: Sequence[LayerRecord], across: Across) -> list[tuple[Tensor, Tensor]]:
    """(share of the pairs, mean probability), [E] each, of each layer, over the batches of all processes."""
    loads = [expert_load(record) for record in records]
    counts = [torch.cat([load.tokens_per_expert, torch.as_tensor(load.tokens)[None]]) for load in loads]
    totals = across_layers([one.total(one.routing.probs_TE) for one in records], across)
    means = []
    for counts_X, total_E in zip(across_layers(counts, across), totals, strict=True):
        pairs_E, tokens = counts_X[:-1], counts_X[-1]
        means.append((ExpertLoad(pairs_E).share, total_E / tokens.clamp(min=1)))
    return means
