"""What experts with packed weights have in common, gated or not: two stacks of matrices in buffers.

Shapes: E experts, H hidden, I intermediate, O outputs, K inputs, G groups of a row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.kernels import packed as kernel

from .base import Experts

Codes = tuple[Tensor, Tensor]
"""Codes int8 [..., O, K] and scales [..., O, G] of one stack of weights."""


class Sizes(NamedTuple):
    """One of the two stacks."""

    name: str
    rows: int
    """O."""
    width: int
    """K."""
    halves: int = 1
    """2 for gate and up rows."""


class PackedStacks(Experts):
    """E experts of two products each, whose weights are codes and scales in buffers.

    A subclass says in :meth:`sizes` which stacks these are, and computes with them.
    """

    indivisible = "are packed for inference"

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        bits: int | Sequence[int],
        group: int,
        act: str,
        nested: bool = False,
    ):
        """
        Args:
            num_experts: E.
            hidden_size: H.
            intermediate_size: I.
            bits: bits of each expert, or one number for all.
            group: neighbouring weights of a row that share a scale; divides H and I.
            act: activation between the products.
            nested: codes can be cut to fewer bits (:func:`unimoe.kernels.packed.planes`).

        Raises:
            UserError: the group does not divide a width, there are no such bits, or not one for each expert.
        """
        super().__init__()
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.intermediate_size = intermediate_size
        self.expert_bits = (bits,) * num_experts if isinstance(bits, int) else tuple(bits)
        if len(self.expert_bits) != num_experts:
            raise UserError(
                f"packed experts got bits for {len(self.expert_bits)} experts, expected {num_experts}"
            )
        self.group, self.act, self.nested = group, act, nested
        for name, rows, width, halves in self.sizes():
            stack = kernel.Stack.empty(self.expert_bits, rows, width, group, nested, halves)
            self.register_buffer(f"{name}_codes", stack.codes)
            self.register_buffer(f"{name}_scales", stack.scales)

    def sizes(self) -> tuple[Sizes, Sizes]:
        """The stack that reads tokens, and the one that writes them."""
        raise NotImplementedError

    def stacks(self) -> tuple[kernel.Stack, kernel.Stack]:
        """Both stacks: what is in this module's buffers."""
        buffers: dict[str, Any] = self._buffers
        first, second = (
            kernel.Stack(
                buffers[f"{name}_codes"],
                buffers[f"{name}_scales"],
                self.expert_bits,
                rows,
                width,
                self.group,
                self.nested,
                halves,
            )
            for name, rows, width, halves in self.sizes()
        )
        return first, second

    @torch.no_grad()
    def fill(self, weights: tuple[Tensor, Tensor], codes: tuple[Codes, Codes] | None = None) -> None:
        """Pack weights [E, O, K] of both stacks.

        Args:
            weights: what is rounded to nearest, without ``codes``.
            codes: codes and scales of both, where they were quantized elsewhere.
        """
        for stack, floats, given in zip(self.stacks(), weights, codes or (None, None), strict=True):
            for e, bits in enumerate(self.expert_bits):
                if given is None:
                    stack.fill(e, *kernel.quantize_rtn(floats[e], bits, self.group))
                else:
                    stack.fill(e, given[0][e], given[1][e])

    @property
    def num_weights(self) -> int:
        """Weights that are packed here."""
        return self.num_experts * sum(rows * width for _, rows, width, _ in self.sizes())

    def extra_repr(self) -> str:
        bits = sorted(set(self.expert_bits))
        sizes = f"experts={self.num_experts}, hidden={self.hidden_size}"
        return f"{sizes}, intermediate={self.intermediate_size}, bits={bits}, group={self.group}"
