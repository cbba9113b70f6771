"""The contract of all routers.

Shapes: T tokens, D hidden.
"""

from dataclasses import dataclass

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


class Router(nn.Module):
    """Chooses experts for tokens: ``forward(x_TD, ctx) -> Routing``."""

    num_experts: int

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        raise TypeError(
            f"{type(self).__name__} has no forward: a Router must define forward(x_TD, ctx) -> Routing"
        )

    def describe(self) -> RouterDescription:
        """Number of experts per token; a router that does not override this counts as dense."""
        return RouterDescription(self.num_experts, self.num_experts, fixed=False)
