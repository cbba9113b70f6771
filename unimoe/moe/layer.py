"""The one MoE layer.

Shapes: T tokens (all leading dimensions flattened), D hidden, S shared experts, N (token, expert) pairs.
"""

import torch
from torch import Tensor, nn

from unimoe.moe.experts.base import Experts
from unimoe.moe.routers.base import Router

from . import records
from .combine import combine_weights
from .dispatcher import Dispatcher
from .routing import Routing


class MoELayer(nn.Module):
    """Stands in for a dense FFN: ``[..., D] -> [..., D]``.

    1. the router chooses experts for each token
    2. the dispatcher brings the tokens to their experts and back: each pair weighted as ``combine`` says
       (combine.py), the pairs of a token summed. Experts that the router knows and ``experts`` does not have
       are null experts: they return zero
    3. ``shared``, an FFN that every token visits, is added; shared ``Experts`` with the weights that the
       router gives them (``extra["shared_TS"]``), or with 1
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
        self.num_experts = experts.num_experts
        """Experts that do something; the router may know null experts behind them."""
        self.num_shared = shared.num_experts if isinstance(shared, Experts) else 0
        self.layer_index = layer_index
        self.dispatcher = Dispatcher()
        """Another where the experts are divided among processes (parallel.py)."""

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD, records.current_context())
        real = routing.first(self.num_experts)
        weight_N = combine_weights(self.combine, routing)[: len(real.token_N)]
        y_TD = self.dispatcher(self.experts, x_TD, real, weight_N.to(x.dtype))
        if self.num_shared:
            visits = self._visits_of_shared(routing)
            y_TD = y_TD + self.shared(x_TD, visits, visits.weight_N.to(x.dtype))
        elif self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        records.append(self.layer_index, routing)
        return y_TD.reshape(x.shape)

    def _visits_of_shared(self, routing: Routing) -> Routing:
        """Every token at every shared expert."""
        logits_TS = routing.logits_TE.new_zeros(routing.num_tokens, self.num_shared)
        weight_TS = routing.extra.get("shared_TS", torch.ones_like(logits_TS))
        every_TS = torch.ones_like(logits_TS, dtype=torch.bool)
        return Routing.from_mask(every_TS, weight_TS, logits_TS, logits_TS)

    @property
    def experts_per_token(self) -> float:
        """Experts with weights that a token visits on average, as far as the router can tell without data:
        null experts are taken to be chosen as often as the others."""
        router = self.router.describe()
        return router.experts_per_token * self.num_experts / router.num_experts
