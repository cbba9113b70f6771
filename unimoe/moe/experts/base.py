"""The contract of all experts.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unimoe.moe.routing import Routing


class Experts(nn.Module):
    """E functions of a token.

    A subclass defines ``forward_rows``, or overrides ``forward`` where it can do gather, experts and sum in
    one. The layer calls the module itself, so forward hooks, CPU and disk offload, and parametrizations work
    as on any other module.
    """

    num_experts: int
    knobs: ClassVar[tuple[str, ...]] = ()
    """Attributes that a schedule may set during training."""
    indivisible: str = ""
    """Why they cannot be divided among processes; empty if they can."""

    frozen: bool = False
    """Whether they stay as they are, whatever a stage trains (``shared.frozen``)."""

    linked: bool = False
    """Whether they use weights of other layers, so that their block cannot be sharded alone."""

    def link(self, position: int, layers: Sequence[Any]) -> None:
        """Called once all ``MoELayer``s of a model are there, in order, for experts that use others."""

    @property
    def num_stored(self) -> int:
        """Experts whose weights are in this module."""
        return self.num_experts

    def forward(self, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        """[T, D] tokens -> [T, D]: the outputs of each token's experts, weighted and summed.

        A token without experts gets zeros. ``weight_N`` [N] is the factor of each pair.
        """
        y_ND = self.forward_rows(x_TD.index_select(0, routing.token_N), routing.offsets_E1, weight_N)
        return torch.zeros_like(x_TD, dtype=y_ND.dtype).index_add(0, routing.token_N, y_ND)

    def after_step(self, across: Callable[[Tensor], Tensor]) -> None:
        """Called after each optimizer step of training; ``across`` is the mean over processes."""

    def active_parameters(self, visits: float) -> float:
        """Parameters that a token visits with ``visits`` experts; those that experts share count whole."""
        return visits * sum(parameter.numel() for parameter in self.parameters()) / self.num_stored

    def forward_rows(self, x_ND: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> Tensor:
        """[N, D] rows grouped by expert -> [N, D], each row's output times its weight."""
        raise TypeError(
            f"{type(self).__name__} has no forward: Experts must define forward_rows(x_ND, offsets_E1, "
            "weight_N) or forward(x_TD, routing, weight_N)"
        )


def local(stack: Tensor) -> Tensor:
    """This process's experts of a stack that is divided among several, else the stack as it is."""
    return stack.to_local() if isinstance(stack, DTensor) else stack
