"""Argument handling shared by the grouped operations.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import choose, compute_dtype


class Arguments(NamedTuple):
    """Arguments of an operation, prepared for the selected form."""

    form: str
    """reference, cpu or triton"""
    x: Tensor
    """Tokens or rows in x's dtype, or autocast's."""
    stacks: list[Tensor]
    """Parameters of all experts in x's dtype; not cast for the cpu form, which casts one expert at a time."""
    weight_N: Tensor | None
    """Factors of the pairs in x's dtype."""


def prepare(operation: str, x: Tensor, stacks: Sequence[Tensor], weight_N: Tensor | None) -> Arguments:
    """Selects the form of ``operation`` and casts its arguments; run the form under ``without_autocast``."""
    dtype = compute_dtype(x)
    x, weight_N = x.to(dtype), None if weight_N is None else weight_N.to(dtype)
    form = choose(operation, x)
    return Arguments(form, x, list(stacks) if form == "cpu" else [one.to(dtype) for one in stacks], weight_N)


def without_autocast(x: Tensor) -> Any:
    """A context with autocast disabled, for arguments that were cast already."""
    kind = x.device.type
    # entering torch.autocast takes as long as a small product; the meta device has none
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow; grad mode is always off inside a Function's forward."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def fast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products with ``x`` are fast: its own, but float32 for half precision on a CPU
    without instructions for it, where such products are five times as slow."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and x.device.type == "cpu" and not _has(x.dtype) else x.dtype


def product_dtype(x: Tensor, weights: Tensor, rows: int) -> torch.dtype:
    """The dtype of one expert's products. With few rows, reading the weights dominates, so they are not
    cast."""
    return torch.promote_types(x.dtype, weights.dtype) if rows <= 4 else fast_dtype(x)


def groups(bounds: list[int]) -> list[tuple[int, int, int]]:
    """(expert, start, end) for each expert that has rows."""
    return [(e, start, end) for e, (start, end) in enumerate(pairwise(bounds)) if end > start]


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out[:] = a @ b``, computed in a's dtype whatever out's is."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def one_by_one(
    expert: Callable[..., Tensor],
    x_ND: Tensor,
    offsets_E1: Tensor,
    stacks: Sequence[Tensor],
    weight_N: Tensor | None,
) -> Tensor:
    """The reference forms: ``expert(x, weight, *parameters)`` for one expert after the other, in plain
    autograd, on its rows [n, H] and their weights [n, 1] or None. Rows of no expert give zeros."""
    sizes = [*offsets_E1.diff().tolist(), x_ND.shape[0] - int(offsets_E1[-1])]
    rows = x_ND.split(sizes)
    weights = [None] * len(sizes) if weight_N is None else weight_N[:, None].split(sizes)
    parameters = zip(*(stack.unbind(0) for stack in stacks), strict=True)
    outputs = [expert(x, weight, *own) for x, weight, own in zip(rows, weights, parameters, strict=False)]
    return torch.cat([*outputs, outputs[0].new_zeros(len(rows[-1]), *outputs[0].shape[1:])])


def rows_of(x: Tensor, token_N: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    """The tokens of a range of pairs, [n, H]; without ``token_N`` x holds one row per pair."""
    return (x[rows] if token_N is None else x.index_select(0, token_N[rows])).to(dtype)


def empty_rows(x: Tensor, token_N: Tensor | None, bounds: list[int]) -> Tensor:
    """[N, H] with one row per pair; rows of no expert are zero, the others uninitialised."""
    y_ND = x.new_empty(bounds[-1] if token_N is not None else x.shape[0], x.shape[1])
    y_ND[bounds[-1] :] = 0
    return y_ND


def sum_pairs(x_TD: Tensor, token_N: Tensor, y_ND: Tensor) -> Tensor:
    """Rows of the pairs summed per token, [T, H]."""
    return torch.zeros_like(x_TD).index_add_(0, token_N[: y_ND.shape[0]], y_ND)


def gather_and_sum(
    rows_to_rows: Callable[..., Tensor], x: Tensor, token_N: Tensor | None, *rest: Any
) -> Tensor:
    """The reference forms on rows, or with ``token_N`` on tokens [T, H] whose pairs are summed."""
    if token_N is None:
        return rows_to_rows(x, *rest)
    return sum_pairs(x, token_N, rows_to_rows(x.index_select(0, token_N), *rest))


def zero_unvisited(grads: Sequence[Tensor | None], bounds: list[int]) -> None:
    """Sets the gradients of experts without pairs to zero."""
    for e, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            for grad in grads:
                if grad is not None:
                    grad[e].zero_()


@cache
def _has(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype``."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if dtype == torch.float16:
        return able.get("amx_fp16", False)
    return able.get("amx_bf16", False) or able.get("avx512_bf16", False)
