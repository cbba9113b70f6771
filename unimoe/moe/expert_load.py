"""How many (token, expert) pairs each expert got.

Shapes: T tokens, E experts, N (token, expert) pairs. Padding tokens count nowhere.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from .records import LayerRecord, real_tokens


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
    routing, real_T = record.routing, real_tokens(record)
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


def _shares(count_E: Tensor) -> Tensor:
    return count_E / count_E.sum().clamp(min=1)
