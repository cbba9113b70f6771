"""The contract of all experts.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unimoe.moe.routing import Routing


@dataclass(frozen=True)
class Origin:
    """How experts came out of dense FFNs."""

    kind: str
    """copy, dense (a dense model per expert) or slice"""
    exact: bool
    """Whether the MoE layer gives the dense FFN's output at the start."""
    when: str
    """The condition under which it does, or why it does not."""


class Experts(nn.Module):
    """E functions of a row; subclasses define ``forward``, and ``mix`` where they can share work between a
    token's experts."""

    num_experts: int

    def forward(self, x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor | None = None) -> Tensor:
        """[N, D] rows grouped by expert -> [N, D], each row's output times its weight."""
        raise TypeError(
            f"{type(self).__name__} has no forward: Experts must define forward(x_ND, offsets_E1, weight_N)"
        )

    def mix(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        """[T, D] tokens -> [T, D]: every token's experts, weighted and summed; a token without experts gets
        zeros."""
        y_ND = self(x_TD.index_select(0, routing.token_N), routing.offsets_E1, weight_N)
        return torch.zeros_like(x_TD, dtype=y_ND.dtype).index_add(0, routing.token_N, y_ND)


def local(stack: Tensor) -> Tensor:
    """This process's experts of a stack that is divided among several, else the stack as it is."""
    return stack.to_local() if isinstance(stack, DTensor) else stack
