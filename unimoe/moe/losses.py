"""Auxiliary losses of routing, and the load itself.

Shapes: T tokens, E experts, N (token, expert) pairs, L layers. Padding tokens count nowhere.

With uniform probabilities the balance loss is 1 whatever the load is, so the loss says nothing about the
load: measure that with ``load``.
"""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .config import MoEConfig
from .records import LayerRecord


def auxiliary_loss(
    moe: MoEConfig,
    records: Sequence[LayerRecord],
    load_LE: Tensor | None = None,
    tokens: Tensor | float | None = None,
) -> Tensor:
    """The configured auxiliary losses, weighted and summed over the recorded layers (at least one): 0-d.

    ``load_LE`` and ``tokens`` as in ``load_balance``.
    """
    total = records[0].routing.logits_TE.new_zeros(())
    if moe.balance_coef:
        total = total + moe.balance_coef * load_balance(records, load_LE, tokens).sum()
    if moe.z_coef:
        total = total + moe.z_coef * z_loss(records, tokens).sum()
    return total


def load_balance(
    records: LayerRecord | Sequence[LayerRecord],
    load_LE: Tensor | None = None,
    tokens: Tensor | float | None = None,
) -> Tensor:
    """Load-balance loss E * sum_i f_i P_i (Fedus et al., arXiv 2101.03961, eq. 4); 1 at uniform routing,
    differentiable in P.

    Args:
        records: one record, or one per layer.
        load_LE: [L, E] shares f to use in place of this batch's, for balance over a global batch.
        tokens: what P is divided by in place of this batch's tokens. With the mean number of tokens of a
            rank, and f of all ranks, the mean over the ranks is the loss of the global batch.

    Returns:
        [L], or a scalar for a single record. Zero where every token is padding.
    """
    if isinstance(records, LayerRecord):
        return _balance(records, None if load_LE is None else load_LE.reshape(-1), tokens)
    if not records:
        return torch.zeros(0)
    return torch.stack(
        [_balance(one, None if load_LE is None else load_LE[i], tokens) for i, one in enumerate(records)]
    )


def z_loss(records: LayerRecord | Sequence[LayerRecord], tokens: Tensor | float | None = None) -> Tensor:
    """Router z-loss, mean of logsumexp(logits)^2 (Zoph et al., arXiv 2202.08906, eq. 5): [L], or a scalar for
    a single record. ``tokens`` as in ``load_balance``."""
    if isinstance(records, LayerRecord):
        z_T = records.routing.logits_TE.logsumexp(dim=-1).square()
        return _mean(z_T[:, None], _real(records), tokens)[0]
    if not records:
        return torch.zeros(0)
    return torch.stack([z_loss(one, tokens) for one in records])


@overload
def load(record: LayerRecord, by_modality: Literal[False] = False) -> Tensor: ...
@overload
def load(record: LayerRecord, by_modality: Literal[True]) -> dict[int, Tensor]: ...
def load(record: LayerRecord, by_modality: bool = False) -> Tensor | dict[int, Tensor]:
    """Share of (token, expert) pairs that each expert got: [E], sums to 1 (zeros if nothing was routed).

    With ``by_modality`` a dict from modality id to [E], for the modalities that occur; where the context
    knows no modalities, everything counts as text, 0.
    """
    if by_modality:
        return {modality: _shares(count_E) for modality, count_E in pair_counts(record, True).items()}
    return _shares(pair_counts(record))


@overload
def pair_counts(record: LayerRecord, by_modality: Literal[False] = False) -> Tensor: ...
@overload
def pair_counts(record: LayerRecord, by_modality: Literal[True]) -> dict[int, Tensor]: ...
def pair_counts(record: LayerRecord, by_modality: bool = False) -> Tensor | dict[int, Tensor]:
    """[E] float32 number of pairs of each expert, without padding; batches' counts may be added, shares not.

    ``by_modality`` as in ``load``.
    """
    routing, real_T = record.routing, _real(record)
    if real_T is None:
        one_N = torch.ones_like(routing.token_N, dtype=torch.float32)
    else:
        one_N = real_T[routing.token_N].float()
    zeros_E = one_N.new_zeros(routing.num_experts)
    if not by_modality:
        return zeros_E.index_add(0, routing.expert_N, one_N)
    modality_T = record.ctx.modality_T
    if modality_T is None:
        modality_T = torch.zeros(routing.num_tokens, dtype=torch.int64, device=one_N.device)
    modality_T = modality_T.reshape(-1)
    present = modality_T if real_T is None else modality_T[real_T]
    modality_N = modality_T[routing.token_N]
    return {
        int(modality): zeros_E.index_add(0, routing.expert_N, one_N * (modality_N == modality))
        for modality in present.unique().tolist()
    }


def _balance(record: LayerRecord, load_E: Tensor | None, tokens: Tensor | float | None) -> Tensor:
    share_E = load(record) if load_E is None else load_E
    mean_E = _mean(record.routing.probs_TE, _real(record), tokens)
    return record.routing.num_experts * (share_E * mean_E).sum()


def _real(record: LayerRecord) -> Tensor | None:
    pad_T = record.ctx.pad_T
    return None if pad_T is None else ~pad_T.reshape(-1).bool()


def _mean(values_TX: Tensor, real_T: Tensor | None, tokens: Tensor | float | None = None) -> Tensor:
    if real_T is None:
        return values_TX.sum(dim=0) / (max(values_TX.shape[0], 1) if tokens is None else tokens)
    real_T1 = real_T[:, None].to(values_TX.dtype)
    return (values_TX * real_T1).sum(dim=0) / (real_T1.sum().clamp(min=1) if tokens is None else tokens)


def _shares(count_E: Tensor) -> Tensor:
    return count_E / count_E.sum().clamp(min=1)
