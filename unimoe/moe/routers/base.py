"""The contract of all routers.

Shapes: T tokens, D hidden.
"""

from torch import Tensor, nn

from unimoe.moe.records import Context
from unimoe.moe.routing import Routing


class Router(nn.Module):
    """Chooses experts for tokens: ``forward(x_TD, ctx) -> Routing``."""

    num_experts: int

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        raise TypeError(
            f"{type(self).__name__} has no forward: a Router must define forward(x_TD, ctx) -> Routing"
        )
