"""How many (token, expert) pairs each expert got, and what follows from it.

Shapes: T tokens, E experts, N (token, expert) pairs, L layers. Padding tokens count nowhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .records import LayerRecord


@dataclass(frozen=True)
class ExpertLoad:
    """The load of the experts of one layer, or of L layers.

    Counts, unlike shares, may be added over batches and averaged over ranks: build the load of a global batch
    from reduced counts, ``ExpertLoad(mean_over_ranks(load.tokens_per_expert), ...)``.
    """

    tokens_per_expert: Tensor
    """[E] or [L, E] float number of pairs of each expert."""
    tokens: Tensor | float | None = None
    """Tokens that were routed, [] or [L]; None where nobody counted them."""

    @property
    def share(self) -> Tensor:
        """[E] or [L, E] share of the pairs that each expert got; sums to 1 (zeros if nothing was routed)."""
        return self.tokens_per_expert / self.tokens_per_expert.sum(-1, keepdim=True).clamp(min=1e-9)

    @property
    def max_over_mean(self) -> Tensor:
        """[] or [L] load of the fullest expert over the mean: 1 when balanced, E when collapsed."""
        share = self.share
        return share.amax(-1) / share.mean(-1).clamp(min=1e-9)

    @property
    def experts_per_token(self) -> Tensor:
        """[] or [L] mean number of experts that a token visits."""
        assert self.tokens is not None
        return self.tokens_per_expert.sum(-1) / torch.as_tensor(self.tokens).clamp(min=1e-9)

    def layer(self, index: int) -> "ExpertLoad":
        """Load of one of L layers."""
        tokens = self.tokens[index] if isinstance(self.tokens, Tensor) and self.tokens.ndim else self.tokens
        return ExpertLoad(self.tokens_per_expert[index], tokens)


def expert_load(records: LayerRecord | Sequence[LayerRecord]) -> ExpertLoad:
    """The load of one record's layer, or of several (at least one) whose layers have as many experts."""
    if isinstance(records, LayerRecord):
        return ExpertLoad(_count(records, _ones(records)), records.tokens)
    loads = [expert_load(one) for one in records]
    tokens_L = torch.stack([torch.as_tensor(one.tokens) for one in loads])
    return ExpertLoad(torch.stack([one.tokens_per_expert for one in loads]), tokens_L)


def expert_load_by_modality(record: LayerRecord) -> dict[int, ExpertLoad]:
    """The load of one layer by modality id, for the modalities that occur; where the context knows none,
    everything counts as text, 0."""
    routing, real_T, one_N = record.routing, record.real_T, _ones(record)
    modality_T = record.ctx.modality_T
    if modality_T is None:
        modality_T = torch.zeros(routing.num_tokens, dtype=torch.int64, device=one_N.device)
    modality_T = modality_T.reshape(-1)
    present = modality_T if real_T is None else modality_T[real_T]
    modality_N, counts = modality_T[routing.token_N], present.unique(return_counts=True)
    return {
        int(modality): ExpertLoad(_count(record, one_N * (modality_N == modality)), float(tokens))
        for modality, tokens in zip(*(values.tolist() for values in counts), strict=True)
    }


def _ones(record: LayerRecord) -> Tensor:
    """[N] float32: 1 for each pair of a real token, 0 for those of padding."""
    real_T, token_N = record.real_T, record.routing.token_N
    return torch.ones_like(token_N, dtype=torch.float32) if real_T is None else real_T[token_N].float()


def _count(record: LayerRecord, one_N: Tensor) -> Tensor:
    return one_N.new_zeros(record.routing.num_experts).index_add(0, record.routing.expert_N, one_N)
