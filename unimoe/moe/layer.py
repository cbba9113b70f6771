"""The one MoE layer.

Shapes: T tokens (all leading dimensions flattened), D hidden, N (token, expert) pairs.
"""

from torch import Tensor, nn

from . import records
from .combine import combine_weights
from .experts import Experts
from .router import Router


class MoELayer(nn.Module):
    """Stands in for a dense FFN: ``[..., D] -> [..., D]``.

    1. the router chooses experts for each token
    2. the experts run on the chosen pairs, weighted as ``combine`` says (combine.py), and are summed per
       token
    3. ``shared``, an FFN that every token visits, is added
    4. the routing goes to the active ``record()``
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        combine: str = "weight",
        shared: nn.Module | None = None,
        layer_index: int = -1,
    ):
        super().__init__()
        self.router, self.experts, self.combine, self.shared = router, experts, combine, shared
        self.layer_index = layer_index

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD, records.current_context())
        y_TD = self.experts.mix(x_TD, routing, combine_weights(self.combine, routing).to(x.dtype))
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        records.append(self.layer_index, routing)
        return y_TD.reshape(x.shape)
