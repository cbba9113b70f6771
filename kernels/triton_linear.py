"""Differentiable products of rows with the matrix of their expert, in Triton; with torch's elementwise steps
they make FFN experts (triton_ffn.py) and experts with adapters (triton_lora.py).

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, K inputs, C outputs, M tiles. Rows
behind ``offsets_E1[-1]`` belong to no expert and give zeros. These are no custom ops, unlike those of
triton_swiglu.py: torch.compile has to trace them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton_grouped import rows_times_weights, weight_gradient
from .triton_routing import by_token, combine, tile_map
from .triton_swiglu import Tiles, tiles_for


@dataclass(eq=False)
class GroupedRows:
    """A routing as the products need it."""

    offsets_E1: Tensor
    token_N: Tensor | None
    """The token of each pair; None where rows come and go one for each pair."""
    rows: int
    """N"""
    tokens: int
    """T; N without ``token_N``"""
    tiles: Tiles
    tiles_3M: Tensor

    @classmethod
    def of(cls, x: Tensor, offsets_E1: Tensor, token_N: Tensor | None) -> "GroupedRows":
        """The pairs of tokens or rows ``x``."""
        rows = len(x if token_N is None else token_N)
        tiles = tiles_for(rows, len(offsets_E1) - 1, x.dtype)
        with torch.cuda.device_of(x):
            tiles_3M = tile_map(offsets_E1, rows, tiles.rows.rows)
        return cls(offsets_E1, token_N, rows, len(x), tiles, tiles_3M)

    @cached_property
    def order(self) -> tuple[Tensor, Tensor]:
        """``order_N`` and ``start_T1`` of triton_routing.by_token."""
        assert self.token_N is not None
        return by_token(self.token_N, self.tokens)

    def owned(self, weight_N: Tensor) -> Tensor:
        """[N, 1] factors of the pairs, zero for rows of no expert, whatever is there."""
        row_N = torch.arange(self.rows, device=weight_N.device)
        return weight_N.where(row_N < self.offsets_E1[-1], 0)[:, None]

    def sum(self, y_NC: Tensor) -> Tensor:
        """The rows of each token, summed in float32 without atomics; the rows themselves without tokens."""
        return y_NC if self.token_N is None else _Sum.apply(y_NC, self)


def linear(x: Tensor, weight_ECK: Tensor, pairs: GroupedRows, gather: bool = False) -> Tensor:
    """[N, C]: each row times the transpose of its expert's matrix.

    Args:
        x: [N, K] rows; with ``gather`` what the pairs were made of, [T, K] where they have tokens.
        weight_ECK: one matrix for each expert; a frozen one costs no gradient.
        pairs: the routing.
        gather: take the row of each pair's token.
    """
    return _Linear.apply(x, weight_ECK, pairs, pairs.token_N if gather else None)


def bias(bias_EC: Tensor, pairs: GroupedRows) -> Tensor:
    """[N, C]: the bias of each row's expert, as a product with ones: its gradient then needs no atomics."""
    return linear(bias_EC.new_ones(pairs.rows, 1), bias_EC[:, :, None], pairs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_ECK: Tensor, pairs: GroupedRows, token_N: Tensor | None
    ) -> Tensor:
        x, weight_ECK = x.contiguous(), weight_ECK.contiguous()
        ctx.save_for_backward(x, weight_ECK)
        ctx.pairs, ctx.token_N = pairs, token_N
        with torch.cuda.device_of(x):
            tiles_3M, tile = pairs.tiles_3M, pairs.tiles.rows
            return rows_times_weights(x, token_N, weight_ECK, tiles_3M, tile, transpose=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_ECK = ctx.saved_tensors
        pairs, dy_NC, dx, d_weight = ctx.pairs, dy_NC.contiguous(), None, None
        with torch.cuda.device_of(x):
            if ctx.needs_input_grad[0]:
                dx = rows_times_weights(dy_NC, None, weight_ECK, pairs.tiles_3M, pairs.tiles.rows)
                if ctx.token_N is not None:
                    dx = combine(dx, *pairs.order)
            if ctx.needs_input_grad[1]:
                tile = pairs.tiles.weights
                d_weight = weight_gradient(dy_NC, x, pairs.offsets_E1, tile, right_token_N=ctx.token_N)
        return dx, d_weight, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_NC: Tensor, pairs: GroupedRows) -> Tensor:
        ctx.token_N = pairs.token_N
        with torch.cuda.device_of(y_NC):
            return combine(y_NC.contiguous(), *pairs.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TC: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dy_TC.index_select(0, ctx.token_N), None
