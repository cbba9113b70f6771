"""The one MoE layer.

Shapes: T tokens (all leading dimensions), D hidden, S shared experts, N (token, expert) pairs, M with null.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from unimoe.moe.experts.base import Experts
from unimoe.moe.routers.base import Router

from . import records
from .capacity import Capacity
from .combine import combine_weights
from .dispatcher import Dispatcher
from .routing import Routing


class MoELayer(nn.Module):
    """Stands in for a dense FFN: ``[..., D] -> [..., D]``.

    1. the router chooses experts for each token; the active ``record()`` keeps this routing
    2. in training, ``capacity`` drops pairs of overfull experts
    3. the dispatcher brings the tokens to their experts and back: each pair weighted as ``combine`` says
       (combine.py), the pairs of a token summed. Experts that the router knows and ``experts`` does not have
       are null experts: they return zero, or the token itself (``null_output="identity"``)
    4. ``finish(x, y)``, where given, makes the output of the sum
    5. ``shared``, an FFN that every token visits, is added, times ``shared_gate``; shared ``Experts`` with
       the weights that the router gives them (``extra["shared_TS"]``), or with 1
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        combine: str = "weight",
        shared: nn.Module | None = None,
        layer_index: int = -1,
        *,
        slices: int = 1,
        null_output: Literal["zero", "identity"] = "zero",
        capacity: Capacity | None = None,
        finish: Callable[[Tensor, Tensor], Tensor] | None = None,
        shared_gate: nn.Module | None = None,
    ):
        super().__init__()
        self.router, self.experts, self.combine, self.shared = router, experts, combine, shared
        self.num_experts = experts.num_experts
        """Experts with weights; the router may know null experts behind them."""
        self.num_null = router.num_experts - experts.num_experts
        self.num_shared = shared.num_experts if isinstance(shared, Experts) else 0
        self.layer_index, self.slices, self.null_output = layer_index, slices, null_output
        self.capacity, self.finish, self.shared_gate = capacity, finish, shared_gate
        self.dispatcher = Dispatcher()
        """Another where the experts are divided among processes (parallel.py)."""

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        routing, y_TD = self.forward_routed(x_TD)
        y_TD = y_TD if self.finish is None else self.finish(x_TD, y_TD)
        if self.shared is not None:
            y_TD = y_TD + self._shared_output(x_TD, routing)
        return y_TD.reshape(x.shape)

    def forward_routed(self, x_TD: Tensor) -> tuple[Routing, Tensor]:
        """Steps 1 to 3; few_rows.py has another form of them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.router.frozen):
            routing = self.router(x_TD, records.current_context())
        records.append(self.layer_index, routing)
        kept = routing if self.capacity is None or not self.training else self.capacity(routing)
        real = kept.first(self.num_experts)
        weight_N = combine_weights(self.combine, kept, self.slices).to(x_TD.dtype)
        y_TD = self.dispatcher(self.experts, x_TD, real, weight_N[: len(real.token_N)])
        if self.null_output == "identity":
            token_M, weight_M = kept.token_N[len(real.token_N) :], weight_N[len(real.token_N) :]
            y_TD = y_TD.index_add(0, token_M, x_TD[token_M] * weight_M[:, None])
        return routing, y_TD

    def _shared_output(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D]: every token at every shared expert."""
        assert self.shared is not None
        if not self.num_shared:
            y_TD = self.shared(x_TD)
        else:
            logits_TS = routing.logits_TE.new_zeros(routing.num_tokens, self.num_shared)
            weight_TS = routing.extra.get("shared_TS", torch.ones_like(logits_TS))
            every_TS = torch.ones_like(logits_TS, dtype=torch.bool)
            visits = Routing.from_mask(every_TS, weight_TS, logits_TS, logits_TS)
            y_TD = self.shared(x_TD, visits, visits.weight_N.to(x_TD.dtype))
        return y_TD if self.shared_gate is None else self.shared_gate(x_TD) * y_TD

    @property
    def experts_per_token(self) -> float:
        """Experts with weights of a token, without data: null experts count as chosen as often as others."""
        router = self.router.describe()
        return router.experts_per_token * self.num_experts / router.num_experts

    @property
    def most_experts_per_token(self) -> float:
        """The same in training, at the most."""
        return self.router.describe().most_in_training or self.experts_per_token
