"""The MoE layer on another engine's experts, which take exactly K slots per token.

Any routing fits: slots that a token does not need hold experts with weight 0.

Shapes: T tokens, D hidden, E experts, K slots of a token.
"""

from typing import Any

import torch
from torch import Tensor

from .combine import combine_dense
from .config import MoEConfig
from .install import build_router
from .layer import MoELayer
from .records import current_context


class SlotMoELayer(MoELayer):
    """A :class:`MoELayer` for inference whose ``experts`` are called as transformers calls its own:
    ``experts(x_TD, index_TK, weight_TK) -> [T, D]``. They may write over ``x_TD``.

    No shape depends on the data, so it can be captured as a CUDA graph.
    """

    slots: int
    """K."""

    @classmethod
    def convert(cls, layer: Any, slots: int) -> None:
        """Make a :class:`MoELayer` one of these, in place; its ``experts`` are the caller's to replace."""
        layer.__class__ = cls
        layer.slots = slots

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD, current_context())
        weight_TE = combine_dense(self.combine, routing, self.slices).to(x.dtype)
        rest_TD = torch.zeros_like(x_TD) if self.shared is None else self._shared_output(x_TD, routing)
        if self.null_output == "identity":
            rest_TD = rest_TD + x_TD * weight_TE[:, self.num_experts :].sum(1, keepdim=True)
        y_TD = self.experts(x_TD, *fill_slots(weight_TE[:, : self.num_experts], self.slots))
        return (y_TD + rest_TD).reshape(x.shape)


def fill_slots(weight_TE: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Ids [T, K] and weights [T, K] of exactly ``slots`` different experts of each token.

    Args:
        weight_TE: zero where the token does not visit the expert; at most ``slots`` of a row are not.
        slots: K.
    """
    index_TK = weight_TE.abs().topk(slots, dim=1).indices
    return index_TK, weight_TE.gather(1, index_TK)


def slots_per_token(moe: MoEConfig, num_hidden_layers: int) -> int:
    """K: the most experts that a token visits in any MoE layer; all, where that depends on the token."""
    positions = range(placed := len(moe.layers(num_hidden_layers)))
    routers = [build_router(8, moe, position, placed, vocab_size=8).describe() for position in positions]
    most = max((int(one.experts_per_token) if one.fixed else moe.num_experts for one in routers), default=1)
    return min(most, moe.num_experts)
