"""Experts that neighbouring MoE layers visit as well.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E own experts, D = H hidden, I intermediate.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.kernels.lora import Adapters
from unimoe.moe.routing import Pairs, Routing

from .swiglu import SwiGLUExperts

if TYPE_CHECKING:
    from unimoe.moe.layer import MoELayer


class PooledExperts(SwiGLUExperts):
    """The router's first E choices are this layer's own experts, the next E those of the nearest other layer
    of its group, and so on (ReXMoE, arXiv 2510.17483).

    Other layers are held by reference: their weights are parameters of their own layer alone, so they are
    saved once and updated once, with the gradients of all layers that used them.
    """

    indivisible = "run the experts of other layers, which sharding gathers for their own block only"

    def __init__(self, num_own: int, hidden_size: int, intermediate_size: int, group: int):
        """``group`` adjacent MoE layers, this one included, share their experts."""
        super().__init__(num_own, hidden_size, intermediate_size)
        self.num_experts, self.num_own, self.group = group * num_own, num_own, group
        self.neighbours: tuple[MoELayer, ...] = ()
        """The other layers of the group, nearest first. A tuple, so that they are no submodules."""

    @property
    def num_stored(self) -> int:
        return self.num_own

    def link(self, position: int, layers: "Sequence[MoELayer]") -> None:
        found = sorted({getattr(layer.router, "candidates", 0) for layer in layers})
        if len(found) > 1:  # losses and loads are stacked over layers
            raise UserError(f"moe.router.candidates is {found}, expected one number for all layers")
        begin = position - position % self.group
        others = [one for one in range(begin, begin + self.group) if one != position]
        others.sort(key=lambda one: abs(one - position))
        self.neighbours = tuple(layers[one] for one in others)
        self.linked = True

    def forward(
        self,
        x_TD: Tensor,
        routing: Routing,
        weight_N: Tensor,
        adapters: Adapters | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        own, weights_N = self._part(routing, weight_N, 0)
        y_TD = super().forward(x_TD, own, weights_N, adapters, scale)
        for place, layer in enumerate(self.neighbours, 1):
            if routing.num_experts > place * self.num_own:
                part, weights_N = self._part(routing, weight_N, place)
                y_TD = y_TD + layer.experts(x_TD, part, weights_N)  # runs its own: the part has E experts
        return y_TD

    def _part(self, routing: Routing, weight_N: Tensor, place: int) -> tuple[Routing, Tensor]:
        """The pairs of one layer of the pool, and their weights."""
        E = self.num_own
        if routing.num_experts == E:
            return routing, weight_N
        offsets_E1 = routing.offsets_E1[place * E : (place + 1) * E + 1]
        begin, end = int(offsets_E1[0]), int(offsets_E1[-1])
        missing = E + 1 - len(offsets_E1)  # experts that are no candidates yet
        offsets_E1 = torch.cat([offsets_E1, offsets_E1[-1:].expand(missing)]) - begin
        pairs = Pairs(
            routing.token_N[begin:end],
            routing.expert_N[begin:end] - place * E,
            routing.weight_N[begin:end],
            offsets_E1,
        )
        return Routing.from_pairs(pairs, routing.logits_TE, routing.probs_TE), weight_N[begin:end]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, own={self.num_own}, group={self.group}"
