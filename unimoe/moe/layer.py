"""The one MoE layer.

Shapes: T tokens (all leading dimensions flattened), D hidden, N (token, expert) pairs.
"""

from functools import partial

import torch
from torch import Tensor, nn

from unimoe.moe.experts.base import Experts
from unimoe.moe.routers.base import Router

from . import records
from .combine import combine_weights
from .parallel import ExpertParallel
from .routing import Routing


class MoELayer(nn.Module):
    """Stands in for a dense FFN: ``[..., D] -> [..., D]``.

    1. the router chooses experts for each token
    2. the experts run on the chosen pairs, weighted as ``combine`` says (combine.py), and are summed per
       token; experts that the router knows and ``experts`` does not have are null experts: they return zero
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
        self.layer_index = layer_index
        self.parallel: ExpertParallel | None = None
        """Set where the experts are divided among processes."""

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD, records.current_context())
        real = routing.first(self.experts.num_experts)
        weight_N = combine_weights(self.combine, routing)[: len(real.token_N)]
        mix = self.experts.mix if self.parallel is None else partial(self.parallel.mix, self.experts)
        y_TD = mix(x_TD, real, weight_N.to(x.dtype))
        if isinstance(self.shared, Experts):
            y_TD = y_TD + self._visit_shared(self.shared, x_TD, routing)
        elif self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        records.append(self.layer_index, routing)
        return y_TD.reshape(x.shape)

    def _visit_shared(self, shared: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
        logits_TS = routing.logits_TE.new_zeros(len(x_TD), shared.num_experts)
        weight_TS = routing.extra.get("shared_TS", torch.ones_like(logits_TS))
        every = Routing.from_mask(
            torch.ones_like(logits_TS, dtype=torch.bool), weight_TS, logits_TS, logits_TS
        )
        return shared.mix(x_TD, every, every.weight_N.to(x_TD.dtype))
