"""Ragged routing: who goes where, as one value for top-k, top-p, thresholds and dense phases alike.

Shapes: T tokens, E experts, K slots per token, N (token, expert) pairs sorted by expert.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Routing:
    """N (token, expert) pairs sorted by expert, with what losses and plots need to know about the choice."""

    token_N: Tensor
    """[N] int64, the token of each pair."""
    expert_N: Tensor
    """[N] int64, the expert of each pair, ascending."""
    weight_N: Tensor
    """[N] float, the router's weight of each pair; differentiable."""
    offsets_E1: Tensor
    """[E+1] int64, expert e owns pairs offsets[e]..offsets[e+1]."""
    logits_TE: Tensor
    """[T, E] float32 router logits before any choice; differentiable."""
    probs_TE: Tensor
    """[T, E] float32 router probabilities before the choice; differentiable."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What one router hands to its own loss."""

    @classmethod
    def from_topk(
        cls, index_TK: Tensor, weight_TK: Tensor, logits_TE: Tensor, probs_TE: Tensor, num_experts: int
    ) -> "Routing":
        """Sorts K slots per token by expert; the order of tokens inside an expert is kept."""
        slot_N, token_N, expert_N, offsets_E1 = sort_by_expert(index_TK, num_experts)
        weight_N = weight_TK.reshape(-1).index_select(0, slot_N)
        return cls(token_N, expert_N, weight_N, offsets_E1, logits_TE, probs_TE)

    @classmethod
    def from_mask(
        cls, chosen_TE: Tensor, weight_TE: Tensor, logits_TE: Tensor, probs_TE: Tensor
    ) -> "Routing":
        """A pair wherever ``chosen_TE`` is true, as many for a token as there are."""
        expert_N, token_N = chosen_TE.T.nonzero(as_tuple=True)
        offsets_E1 = F.pad(chosen_TE.sum(dim=0).cumsum(dim=0), (1, 0))
        return cls(token_N, expert_N, weight_TE[token_N, expert_N], offsets_E1, logits_TE, probs_TE)

    def first(self, num_experts: int) -> "Routing":
        """The pairs of the first ``num_experts`` experts; those of the rest, null experts, give nothing."""
        if num_experts == self.num_experts:
            return self
        offsets_E1 = self.offsets_E1[: num_experts + 1]
        end = int(offsets_E1[-1])
        pairs = (self.token_N[:end], self.expert_N[:end], self.weight_N[:end])
        return Routing(*pairs, offsets_E1, self.logits_TE, self.probs_TE, self.extra)

    @property
    def num_tokens(self) -> int:
        return self.logits_TE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.offsets_E1.shape[0] - 1


def sort_by_expert(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots of ``index_TK`` grouped by expert: (slot_N, token_N, expert_N, offsets_E1), all int64.

    slot_N points into ``index_TK.reshape(-1)``. Ids >= num_experts (transformers marks slots of other
    machines so) are sorted behind offsets_E1[-1]; the caller drops them or lets its kernel skip them.
    """
    expert_N, slot_N = torch.sort(index_TK.reshape(-1), stable=True)
    edges_E1 = torch.arange(num_experts + 1, device=index_TK.device, dtype=expert_N.dtype)
    offsets_E1 = torch.searchsorted(expert_N, edges_E1)
    return slot_N, slot_N // index_TK.shape[1], expert_N, offsets_E1
