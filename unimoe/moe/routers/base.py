"""The contract of all routers.

Shapes: T tokens, D hidden.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from unimoe.moe.records import Context
from unimoe.moe.routing import Routing


@dataclass(frozen=True)
class RouterDescription:
    """What is known about a router without data."""

    num_experts: int
    """Experts that it chooses from, null experts included."""
    experts_per_token: float
    """Experts that a token visits, null experts included; where that depends on the token, the number while
    all experts are equally probable, as at the start."""
    fixed: bool
    """Whether every token visits as many."""


class Router(nn.Module):
    """Chooses experts for tokens: ``forward(x_TD, ctx) -> Routing``."""

    num_experts: int

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        raise TypeError(
            f"{type(self).__name__} has no forward: a Router must define forward(x_TD, ctx) -> Routing"
        )

    def describe(self) -> RouterDescription:
        """How many experts a token visits; a router that does not say counts as dense."""
        return RouterDescription(self.num_experts, self.num_experts, fixed=False)
