"""The contract of all routers.

Shapes: T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.moe.records import Context
from unimoe.moe.routing import Routing


@dataclass(frozen=True)
class RouterDescription:
    """Properties of a router that need no data."""

    num_experts: int
    """Experts to choose from, null experts included."""
    experts_per_token: float
    """Experts per token, null experts included; if that depends on the token, the number for equally probable
    experts, as before training."""
    fixed: bool
    """Whether it is the same for every token."""
    most_in_training: float | None = None
    """Experts per token while it trains, at the most, where these are more than ``experts_per_token``."""


class Router(nn.Module):
    """Chooses experts for tokens: ``forward(x_TD, ctx) -> Routing``.

    Persistent buffers are state: checkpoints of a run hold them, as they hold what trains.
    """

    num_experts: int
    knobs: ClassVar[tuple[str, ...]] = ("frozen",)
    """Attributes that a schedule may set during training, and that may differ between layers."""
    common_knobs: ClassVar[tuple[str, ...]] = ()
    """Knobs that must not differ between layers: the width of what is recorded follows from them."""
    expert_rows: ClassVar[tuple[str, ...]] = ()
    """Parameters and buffers with one row for each expert with weights, and others behind those; empty where
    experts cannot be added or taken away."""
    frozen: bool = False
    """Whether the router stays as it is: it gets no gradient and does not act on the load. A schedule stops
    the gate so after enough steps (theory of MoE in continual learning, arXiv 2406.16437). Its parameters
    still require gradients, so that checkpoints hold what they held before."""
    linked: bool = False
    """Whether it uses weights of other layers, so that its block cannot be sharded alone."""
    looks_ahead: ClassVar[str] = ""
    """How the choice for a token depends on later tokens or on other samples; empty if it does not. Causal
    LMs refuse such a router."""

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        raise TypeError(
            f"{type(self).__name__} has no forward: a Router must define forward(x_TD, ctx) -> Routing"
        )

    def link(self, position: int, layers: Sequence[Any]) -> None:
        """Called once all ``MoELayer``s of a model are there, in order, for routers that use others."""

    @property
    def acts_on_load(self) -> bool:
        """Whether ``after_step`` does anything, so that a run counts the load."""
        return type(self).after_step is not Router.after_step

    def after_step(self, load_E: Tensor) -> None:
        """Called after each optimizer step of training.

        Args:
            load_E: [E] float number of pairs of each expert in the step, over all of its micro-batches and
                processes, without padding.
        """

    def describe(self) -> RouterDescription:
        """Number of experts per token; a router that does not override this counts as dense."""
        return RouterDescription(self.num_experts, self.num_experts, fixed=False)


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer in float32, or in float64 where ``x`` is: routers compute no coarser, whatever the dtype
    of the model."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
