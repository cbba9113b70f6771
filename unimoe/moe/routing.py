"""Ragged routing: one value for top-k, top-p, thresholds and dense phases alike.

Shapes: T tokens, E experts, K slots per token, N (token, expert) pairs sorted by expert.
"""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """The N (token, expert) pairs of a routing, sorted by expert; tokens ascend inside an expert."""

    token_N: Tensor
    """[N] int64, the token of each pair."""
    expert_N: Tensor
    """[N] int64, the expert of each pair, ascending."""
    weight_N: Tensor
    """[N] float, the router's weight of each pair; differentiable."""
    offsets_E1: Tensor
    """[E+1] int64, expert e owns pairs offsets[e]..offsets[e+1]."""


class Routing:
    """Which experts each token visits and with what weight, plus what losses and plots need to know.

    The choice has two views, each computed on first use: pairs sorted by expert (``token_N``, ``expert_N``,
    ``weight_N``, ``offsets_E1``) for the kernels, and :meth:`dense` for banks of low-rank experts and for
    exported graphs, whose shapes must not depend on the data. Build one with :meth:`from_topk`,
    :meth:`from_mask` or :meth:`from_pairs`.
    """

    def __init__(
        self,
        num_experts: int,
        logits_TE: Tensor,
        probs_TE: Tensor | Callable[[], Tensor],
        extra: dict[str, Tensor] | None = None,
    ):
        """``probs_TE`` may be a function, called on first use, where the choice does not need them."""
        self.num_experts = num_experts
        self.logits_TE = logits_TE
        """[T, E] float32 router logits before the choice; differentiable."""
        self._probs_TE = probs_TE
        self.extra = extra or {}
        """Tensors that a router hands to its own loss. A name ends in its shape letters: the first is T (one
        row per token) or N (one per pair), or the tensor belongs to the whole layer."""

    @classmethod
    def from_topk(
        cls,
        index_TK: Tensor,
        weight_TK: Tensor,
        logits_TE: Tensor,
        probs_TE: Tensor | Callable[[], Tensor],
        num_experts: int,
    ) -> "Routing":
        """K slots per token, each a different expert; see ``__init__`` for ``probs_TE``."""
        return _SlotRouting(index_TK, weight_TK, logits_TE, probs_TE, num_experts)

    @classmethod
    def from_mask(
        cls, chosen_TE: Tensor, weight_TE: Tensor, logits_TE: Tensor, probs_TE: Tensor
    ) -> "Routing":
        """A pair wherever ``chosen_TE`` is true, as many for a token as there are."""
        return _MaskRouting(chosen_TE, weight_TE, logits_TE, probs_TE)

    @classmethod
    def from_pairs(
        cls, pairs: Pairs, logits_TE: Tensor, probs_TE: Tensor, extra: dict[str, Tensor] | None = None
    ) -> "Routing":
        """Pairs that are sorted already."""
        return _PairRouting(pairs, logits_TE, probs_TE, extra)

    @cached_property
    def probs_TE(self) -> Tensor:
        """[T, E] float32 router probabilities before the choice; differentiable."""
        return self._probs_TE if isinstance(self._probs_TE, Tensor) else self._probs_TE()

    @cached_property
    def pairs(self) -> Pairs:
        """The choice as pairs sorted by expert."""
        raise NotImplementedError

    def chosen(self) -> Tensor:
        """[T, E] bool, True where the token visits the expert."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """[T, E] router weights, zero where the token does not visit the expert; differentiable."""
        raise NotImplementedError

    def first(self, num_experts: int) -> "Routing":
        """The pairs of the first ``num_experts`` experts; the rest are null experts, whose output is zero."""
        if num_experts == self.num_experts:
            return self
        offsets_E1 = self.offsets_E1[: num_experts + 1]
        end = int(offsets_E1[-1])
        pairs = Pairs(self.token_N[:end], self.expert_N[:end], self.weight_N[:end], offsets_E1)
        return Routing.from_pairs(pairs, self.logits_TE, self.probs_TE, self.extra)

    @property
    def num_tokens(self) -> int:
        return self.logits_TE.shape[0]

    @property
    def token_N(self) -> Tensor:
        return self.pairs.token_N

    @property
    def expert_N(self) -> Tensor:
        return self.pairs.expert_N

    @property
    def weight_N(self) -> Tensor:
        return self.pairs.weight_N

    @property
    def offsets_E1(self) -> Tensor:
        return self.pairs.offsets_E1


class _SlotRouting(Routing):
    def __init__(
        self,
        index_TK: Tensor,
        weight_TK: Tensor,
        logits_TE: Tensor,
        probs_TE: Tensor | Callable[[], Tensor],
        num_experts: int,
    ):
        super().__init__(num_experts, logits_TE, probs_TE)
        self._index_TK, self._weight_TK = index_TK, weight_TK

    @cached_property
    def pairs(self) -> Pairs:
        slot_N, token_N, expert_N, offsets_E1 = sort_by_expert(self._index_TK, self.num_experts)
        weight_N = self._weight_TK.reshape(-1).index_select(0, slot_N)
        return Pairs(token_N, expert_N, weight_N, offsets_E1)

    def chosen(self) -> Tensor:
        index_TK = self._index_TK
        unchosen_TE = index_TK.new_zeros(self.num_tokens, self.num_experts, dtype=torch.bool)
        return unchosen_TE.scatter(1, index_TK, torch.ones_like(index_TK, dtype=torch.bool))

    def dense(self) -> Tensor:
        zeros_TE = self._weight_TK.new_zeros(self.num_tokens, self.num_experts)
        return zeros_TE.scatter(1, self._index_TK, self._weight_TK)


class _MaskRouting(Routing):
    def __init__(self, chosen_TE: Tensor, weight_TE: Tensor, logits_TE: Tensor, probs_TE: Tensor):
        super().__init__(chosen_TE.shape[1], logits_TE, probs_TE)
        self._chosen_TE, self._weight_TE = chosen_TE, weight_TE

    @cached_property
    def pairs(self) -> Pairs:
        expert_N, token_N = self._chosen_TE.T.nonzero(as_tuple=True)
        offsets_E1 = F.pad(self._chosen_TE.sum(dim=0).cumsum(dim=0), (1, 0))
        return Pairs(token_N, expert_N, self._weight_TE[token_N, expert_N], offsets_E1)

    def chosen(self) -> Tensor:
        return self._chosen_TE

    def dense(self) -> Tensor:
        return self._weight_TE.masked_fill(~self._chosen_TE, 0)


class _PairRouting(Routing):
    def __init__(
        self, pairs: Pairs, logits_TE: Tensor, probs_TE: Tensor, extra: dict[str, Tensor] | None = None
    ):
        super().__init__(pairs.offsets_E1.shape[0] - 1, logits_TE, probs_TE, extra)
        self.pairs = pairs

    def chosen(self) -> Tensor:
        unchosen_TE = self.token_N.new_zeros(self.num_tokens, self.num_experts, dtype=torch.bool)
        true_N = torch.ones_like(self.token_N, dtype=torch.bool)
        return unchosen_TE.index_put((self.token_N, self.expert_N), true_N)

    def dense(self) -> Tensor:
        zeros_TE = self.weight_N.new_zeros(self.num_tokens, self.num_experts)
        return zeros_TE.index_put((self.token_N, self.expert_N), self.weight_N)


def sort_by_expert(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots of ``index_TK`` grouped by expert: (slot_N, token_N, expert_N, offsets_E1), all int64.

    slot_N points into ``index_TK.reshape(-1)``. Ids >= num_experts (transformers marks slots of other
    machines so) are sorted behind offsets_E1[-1]; the caller drops them or lets its kernel skip them.
    """
    expert_N, slot_N = torch.sort(index_TK.reshape(-1), stable=True)
    edges_E1 = torch.arange(num_experts + 1, device=index_TK.device, dtype=expert_N.dtype)
    offsets_E1 = torch.searchsorted(expert_N, edges_E1)
    return slot_N, slot_N // index_TK.shape[1], expert_N, offsets_E1
