"""Ragged routing: one value for top-k, top-p, thresholds and dense phases alike.

Shapes: T tokens, E experts, K slots per token, N (token, expert) pairs sorted by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Probs = Tensor | Callable[[], Tensor]


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


@dataclass(eq=False, kw_only=True)
class Routing:
    """Which experts each token visits and with what weight, plus what losses and plots need to know.

    The choice has two views, each computed on first use: pairs sorted by expert (``token_N``, ``expert_N``,
    ``weight_N``, ``offsets_E1``) for the kernels, and :meth:`dense` for banks of low-rank experts and for
    exported graphs, whose shapes must not depend on the data. Build one with :meth:`from_topk`,
    :meth:`from_mask` or :meth:`from_pairs`. FSDP2 finds the tensors of a dataclass.
    """

    num_experts: int
    logits_TE: Tensor
    """[T, E] router logits, float32 or float64 before the choice; differentiable."""
    probs: Probs
    """``probs_TE``, or what computes it on first use."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that a router hands to its own loss. A name ends in its shape letters: the first is T (one
    row per token) or N (one per pair), or the tensor belongs to the whole layer."""

    @classmethod
    def from_topk(
        cls, index_TK: Tensor, weight_TK: Tensor, logits_TE: Tensor, probs_TE: Probs, num_experts: int
    ) -> "Routing":
        """K slots per token, each a different expert; ``probs_TE`` may be a function (see ``probs``)."""
        return _SlotRouting(
            num_experts=num_experts,
            logits_TE=logits_TE,
            probs=probs_TE,
            index_TK=index_TK,
            weight_TK=weight_TK,
        )

    @classmethod
    def from_mask(
        cls, chosen_TE: Tensor, weight_TE: Tensor, logits_TE: Tensor, probs_TE: Tensor
    ) -> "Routing":
        """A pair wherever ``chosen_TE`` is true, as many for a token as there are."""
        return _MaskRouting(
            num_experts=chosen_TE.shape[1],
            logits_TE=logits_TE,
            probs=probs_TE,
            chosen_TE=chosen_TE,
            weight_TE=weight_TE,
        )

    @classmethod
    def from_pairs(
        cls, pairs: Pairs, logits_TE: Tensor, probs_TE: Probs, extra: dict[str, Tensor] | None = None
    ) -> "Routing":
        """Pairs that are sorted already."""
        return _PairRouting(
            num_experts=pairs.offsets_E1.shape[0] - 1,
            logits_TE=logits_TE,
            probs=probs_TE,
            extra=extra or {},
            pairs=pairs,
        )

    @cached_property
    def probs_TE(self) -> Tensor:
        """[T, E] router probabilities before the choice; differentiable."""
        return self.probs if isinstance(self.probs, Tensor) else self.probs()

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


@dataclass(eq=False, kw_only=True)
class _SlotRouting(Routing):
    index_TK: Tensor
    weight_TK: Tensor

    @cached_property
    def pairs(self) -> Pairs:
        slot_N, token_N, expert_N, offsets_E1 = sort_by_expert(self.index_TK, self.num_experts)
        return Pairs(token_N, expert_N, self.weight_TK.reshape(-1).index_select(0, slot_N), offsets_E1)

    def chosen(self) -> Tensor:
        unchosen_TE = self.index_TK.new_zeros(self.num_tokens, self.num_experts, dtype=torch.bool)
        return unchosen_TE.scatter(1, self.index_TK, torch.ones_like(self.index_TK, dtype=torch.bool))

    def dense(self) -> Tensor:
        zeros_TE = self.weight_TK.new_zeros(self.num_tokens, self.num_experts)
        return zeros_TE.scatter(1, self.index_TK, self.weight_TK)


@dataclass(eq=False, kw_only=True)
class _MaskRouting(Routing):
    chosen_TE: Tensor
    weight_TE: Tensor

    @cached_property
    def pairs(self) -> Pairs:
        expert_N, token_N = self.chosen_TE.T.nonzero(as_tuple=True)
        offsets_E1 = F.pad(self.chosen_TE.sum(dim=0).cumsum(dim=0), (1, 0))
        return Pairs(token_N, expert_N, self.weight_TE[token_N, expert_N], offsets_E1)

    def chosen(self) -> Tensor:
        return self.chosen_TE

    def dense(self) -> Tensor:
        return self.weight_TE.masked_fill(~self.chosen_TE, 0)


@dataclass(eq=False, kw_only=True)
class _PairRouting(Routing):
    pairs: Pairs  # type: ignore[assignment]

    def chosen(self) -> Tensor:
        unchosen_TE = self.token_N.new_zeros(self.num_tokens, self.num_experts, dtype=torch.bool)
        true_N = torch.ones_like(self.token_N, dtype=torch.bool)
        return unchosen_TE.index_put((self.token_N, self.expert_N), true_N)

    def dense(self) -> Tensor:
        zeros_TE = self.weight_N.new_zeros(self.num_tokens, self.num_experts)
        return zeros_TE.index_put((self.token_N, self.expert_N), self.weight_N)


def sort_by_expert(index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots of ``index_TK`` grouped by expert: (slot_N, token_N, expert_N, offsets_E1), all int64.

    slot_N points into ``index_TK.reshape(-1)``. Ids >= num_experts (slots of other machines) are sorted
    behind offsets_E1[-1]; the caller drops them or lets its kernel skip them.
    """
    expert_N, slot_N = torch.sort(index_TK.reshape(-1), stable=True)
    edges_E1 = torch.arange(num_experts + 1, device=index_TK.device, dtype=expert_N.dtype)
    offsets_E1 = torch.searchsorted(expert_N, edges_E1)
    return slot_N, slot_N // index_TK.shape[1], expert_N, offsets_E1
