"""What a rewriting of a routing knows about its tokens, and which of several rewritings applies.

Shapes: T tokens of a forward pass, B rows of a batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from unimoe.moe import Context
from unimoe.moe.view import MoEView

from .route import Rewrite, route

_active: ContextVar[object] = ContextVar("unimoe_rewritten_routing", default=None)


@contextmanager
def rewritten(layers: Sequence[MoEView], fn: Rewrite) -> Iterator[None]:
    """Rewrite routings as :func:`unimoe.compress.route.route` does, in place of every rewriting around it and
    of the rule that the model itself skips by (:func:`unimoe.compress.skip_rules.install`)."""

    def innermost(layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        return fn(layer, x_TD, index_TK, weight_TK) if _active.get() is fn else (index_TK, weight_TK)

    token = _active.set(fn)
    try:
        with route(layers, innermost):
            yield
    finally:
        _active.reset(token)


def is_rewritten() -> bool:
    """Whether a :func:`rewritten` is open."""
    return _active.get() is not None


def unchanged(layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
    """The rewriting that leaves a routing as the router made it, without the model's own rule."""
    return index_TK, weight_TK


def row_of(ctx: Context, tokens: int, rows: int, device: torch.device) -> Tensor:
    """[T] int64 row of each token of a forward pass over ``rows`` rows of equal length."""
    if ctx.sample_T is not None and ctx.sample_T.numel() == tokens:
        return ctx.sample_T.reshape(-1)
    return torch.arange(tokens, device=device) // max(tokens // rows, 1)


def modality_ids(ctx: Context, tokens: int, device: torch.device) -> Tensor:
    """[T] int64 modality of each token; text where a forward pass says nothing about its tokens."""
    if ctx.modality_T is None or ctx.modality_T.numel() != tokens:
        return torch.zeros(tokens, dtype=torch.long, device=device)
    return ctx.modality_T.reshape(-1)


def real_tokens(ctx: Context, tokens: int, device: torch.device) -> Tensor:
    """[T] bool, false on padding."""
    if ctx.pad_T is None:
        return torch.ones(tokens, dtype=torch.bool, device=device)
    return ~ctx.pad_T.reshape(-1).bool()
