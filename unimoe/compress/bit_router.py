"""Bits by token: packed experts that are read in fewer bits than they have (D2MoE, arXiv 2504.15299,
section 4).

The codes of such experts are nested: their first bits are a coarser code. A router at each layer chooses for
every (token, expert) pair how many bits are read. It is trained by distillation with a price on bits
(:mod:`unimoe.compress.tune`); the paper does not describe its form, here it is one linear map for each
expert. In the paper every further bit has scales of its own (:mod:`unimoe.compress.nested`); the codes of the
kernels have one scale, and a code that is cut stands for the middle of those that begin with it.

Shapes: T tokens, N (token, expert) pairs sorted by expert, D hidden, E experts, B numbers of bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimoe.errors import UserError
from unimoe.kernels import packed as kernel
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.records import current_context
from unimoe.moe.routing import Routing
from unimoe.moe.view import MoEView

from .rows import real_tokens

LEAST = {4: 2, 8: 4}
"""Bits of a code that can be cut -> the fewest bits that it can be cut to."""


class BitRouter(nn.Module):
    """Linear(D, B) in front of each of E experts.

    Args:
        bits: the numbers of bits, ascending. A router that was not trained prefers the highest.
    """

    def __init__(self, num_experts: int, hidden_size: int, bits: Sequence[int]):
        super().__init__()
        self.bits = list(bits)
        self.weight = nn.Parameter(torch.zeros(num_experts, len(self.bits), hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts, len(self.bits)))
        nn.init.constant_(self.bias[:, -1], 4.0)

    def forward(self, x_ND: Tensor, expert_N: Tensor) -> Tensor:
        """Probability [N, B] of each number of bits for rows ``x_ND`` of the experts ``expert_N``."""
        logits_NB = self.bias[expert_N].float()
        for expert in expert_N.unique().tolist():
            rows = expert_N == expert
            logits_NB[rows] = logits_NB[rows] + x_ND[rows].float() @ self.weight[expert].float().t()
        return logits_NB.softmax(-1)


@dataclass
class Reading:
    """How pairs read nested experts inside :func:`reading`, and what they read."""

    choose: Callable[[Tensor], Tensor] = field(default=lambda p_NB: p_NB.argmax(1))
    """Probabilities [N, B] -> index [N] among the numbers of bits."""
    soft: bool = False
    """Whether pairs read all numbers of bits, weighted by their probabilities, as training does."""
    pairs_B: Tensor | None = None
    """How many pairs read each number of bits, padding left out."""
    expected: list[Tensor] = field(default_factory=list)
    """``soft``: mean expected bits of each forward pass of a layer, padding left out."""

    def price(self) -> Tensor:
        """Mean expected bits since the last call."""
        found, self.expected = torch.stack(self.expected).mean(), []
        return found

    def mean_bits(self, bits: Sequence[int]) -> float:
        """Bits that a pair reads on average, of weights without their scales."""
        assert self.pairs_B is not None
        return float((self.pairs_B * self.pairs_B.new_tensor(bits)).sum() / self.pairs_B.sum())


_current: ContextVar[Reading | None] = ContextVar("unimoe_reading", default=None)


@contextmanager
def reading(how: Reading) -> Iterator[Reading]:
    """Inside, nested experts are read as ``how`` says, instead of by their routers alone."""
    token = _current.set(how)
    try:
        yield how
    finally:
        _current.reset(token)


def all_bits(p_NB: Tensor) -> Tensor:
    """The choice of all bits for every pair: the model before it had routers of bits."""
    return torch.full_like(p_NB[:, 0], p_NB.shape[1] - 1, dtype=torch.long)


def attach(layers: Sequence[MoEView], bits: Sequence[int]) -> None:
    """Give each layer its router of bits, a child of the block named ``bit_router``, and nested experts with
    the codes that they have.

    Raises:
        UserError: the experts are not packed, or cannot be read in these numbers of bits.
    """
    for layer in layers:
        _check(layer, bits)
    for layer in layers:
        experts: Any = layer.experts
        device = experts.bits.device
        router = BitRouter(layer.num_experts, experts.hidden_size, bits).to(device)
        nested = experts if experts.nested else experts.as_nested()
        layer.block.bit_router = router
        layer.block.experts = nested
        nested.forward = partial(_forward, nested, router)  # few_rows.py sees it, and steps aside


def _check(layer: MoEView, bits: Sequence[int]) -> None:
    if not isinstance(layer.experts, PackedExperts):
        raise UserError(
            f"{layer.name} has {type(layer.experts).__name__}, expected packed experts: run `unimoe compress "
            "quantize --bits 4` (or 8) before tune --what bits"
        )
    own = set(layer.experts.expert_bits)
    if len(own) > 1 or not own <= LEAST.keys():
        raise UserError(f"{layer.name} has experts of {sorted(own)} bits, expected 4 or 8 for all of them")
    (top,) = own
    if len(bits) < 2 or sorted({*bits}) != [*bits] or bits[0] < LEAST[top] or bits[-1] != top:
        raise UserError(
            f"--levels {' '.join(map(str, bits[:-1]))}: experts of {top} bits can be read in {LEAST[top]} to "
            f"{top - 1} of them; give some of these, ascending"
        )


def _forward(
    experts: PackedExperts, router: BitRouter, x_TD: Tensor, routing: Routing | Tensor, weight: Tensor
) -> Tensor:
    """Stand in for :meth:`PackedExperts.forward`, with the same arguments."""
    token_N, offsets_E1, weight_N = experts.pairs(routing, weight)
    token_N, weight_N = token_N[: offsets_E1[-1]], weight_N[: offsets_E1[-1]]
    counts_E = offsets_E1.diff()
    expert_N = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E)
    how, stacks = _current.get(), experts.stacks()

    def read(token: Tensor, offsets: Tensor, weights: Tensor, bits: int) -> Tensor:
        return kernel.fused_experts(x_TD, token, offsets, weights, *stacks, experts.bits, experts.act, bits)

    p_NB = router(x_TD[token_N], expert_N)
    if how is not None and how.soft:
        how.expected.append((p_NB[_real(x_TD)[token_N]] @ p_NB.new_tensor(router.bits)).mean())
        parts = [
            read(token_N, offsets_E1, weight_N * p_NB[:, b].to(weight_N.dtype), bits)
            for b, bits in enumerate(router.bits)
        ]
        return torch.stack(parts).sum(0)
    choice_N = p_NB.argmax(1) if how is None else how.choose(p_NB)
    if how is not None:
        taken_B = choice_N[_real(x_TD)[token_N]].bincount(minlength=len(router.bits))
        how.pairs_B = taken_B if how.pairs_B is None else how.pairs_B + taken_B
    y_TD = torch.zeros_like(x_TD)
    for b, bits in enumerate(router.bits):
        row_n = (choice_N == b).nonzero().flatten()
        if len(row_n):
            ends_E = expert_N[row_n].bincount(minlength=len(counts_E)).cumsum(0)
            y_TD = y_TD + read(token_N[row_n], F.pad(ends_E, (1, 0)), weight_N[row_n], bits)
    return y_TD


def _real(x_TD: Tensor) -> Tensor:
    """[T] bool, false on padding of the forward pass that is running."""
    return real_tokens(current_context(), len(x_TD), x_TD.device)
