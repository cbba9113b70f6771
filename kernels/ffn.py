"""Grouped two-layer FFN experts with biases: y = (act(x Wu^T + bu) Wd^T + bd) * weight, each row through the
expert of its group.

Shapes: T tokens, N rows (token, expert pairs sorted by expert), E experts, H hidden, I intermediate.
up_proj [E, I, H], up_bias [E, I], down_proj [E, H, I], down_bias [E, H]; offsets_E1 [E+1] int64: expert e
owns rows offsets[e]..offsets[e+1]. These are the FFNs of detection transformers (ReLU) and of BERT-like ones
(GELU).

Three forms with equal results, as in swiglu.py: ``reference`` in plain autograd, ``triton`` (triton_ffn.py),
and ``cpu``, one autograd.Function that saves the input and the pre-activations, does no work for what is
frozen, and has its loop over experts in C++ where that is built (native.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimoe.errors import UserError

from . import native
from .arguments import (
    empty_rows,
    fast_dtype,
    gather_and_sum,
    groups,
    mm_into,
    needs_grad,
    one_by_one,
    prepare,
    product_dtype,
    rows_of,
    sum_pairs,
    without_autocast,
    zero_unvisited,
)
from .dispatch import triton_form

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def fused_ffn_experts(
    x: Tensor,
    offsets_E1: Tensor,
    up_proj: Tensor,
    up_bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
    act: str = "relu",
    weight_N: Tensor | None = None,
    token_N: Tensor | None = None,
) -> Tensor:
    """Runs every pair through its expert; with ``token_N`` gather, experts and sum in one.

    Args:
        x, offsets_E1, token_N: as of :func:`~unimoe.kernels.swiglu.fused_experts`.
        up_proj, up_bias, down_proj, down_bias: [E, I, H], [E, I], [E, H, I], [E, H].
        act: ``relu`` or ``gelu`` (the exact one, by erf).
        weight_N: [N] factor of each pair's output, biases included, or None for 1.

    Returns:
        [N, H], or [T, H] with ``token_N``, in x's dtype (autocast's dtype under autocast).

    Raises:
        UserError: another activation.
    """
    if act not in ACTS:
        raise UserError(f"FFN experts got the activation {act!r}, expected one of {', '.join(ACTS)}")
    stacks = (up_proj, up_bias, down_proj, down_bias)
    form, x, stacks, weight_N = prepare("fused_ffn_experts", x, stacks, weight_N)
    with without_autocast(x):
        if form == "reference":
            run = partial(ffn_experts_reference, act=act, weight_N=weight_N)
            return gather_and_sum(run, x, token_N, offsets_E1, *stacks)
        if form == "triton":
            run = triton_form("fused_ffn_experts")
            return run(x, offsets_E1, *stacks, act, weight_N, token_N)
        return _grouped(x, token_N, offsets_E1, stacks, act, weight_N)


def ffn_experts_reference(
    x_ND: Tensor,
    offsets_E1: Tensor,
    up_proj: Tensor,
    up_bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
    act: str = "relu",
    weight_N: Tensor | None = None,
) -> Tensor:
    """``fused_ffn_experts`` on rows, one expert after the other in plain autograd."""

    def expert(x: Tensor, weight: Tensor | None, up: Tensor, up_b: Tensor, *last: Tensor) -> Tensor:
        y = F.linear(ACTS[act](F.linear(x, up, up_b)), *last)
        return y if weight is None else y * weight

    return one_by_one(expert, x_ND, offsets_E1, (up_proj, up_bias, down_proj, down_bias), weight_N)


def _grouped(
    x: Tensor,
    token_N: Tensor | None,
    offsets_E1: Tensor,
    stacks: list[Tensor],
    act: str,
    weight_N: Tensor | None,
) -> Tensor:
    """The cpu form: rows to rows where ``token_N`` is None, else tokens to sums over their pairs."""
    arguments = (x.contiguous(), token_N, offsets_E1.tolist(), *stacks, weight_N, act)
    return _FFN.apply(*arguments) if needs_grad(x, *stacks, weight_N) else _run(*arguments, h_NI=None)


class _FFN(torch.autograd.Function):
    """Saved for backward: x, pre-activations [N, I], and weights and routing by reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_N: Tensor | None, bounds: list[int], *rest: Any) -> Tensor:
        *stacks, weight_N, act = rest
        h_NI = x.new_empty(bounds[-1], stacks[0].shape[1])
        ctx.bounds, ctx.act = bounds, act
        ctx.save_for_backward(x, token_N, h_NI, weight_N, *stacks)
        return _run(x, token_N, bounds, *rest, h_NI=h_NI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, token_N, h_NI, weight_N, *stacks = ctx.saved_tensors
        need_x, _, _, *need_stacks, need_weight, _ = ctx.needs_input_grad
        dy, bounds, ops = dy.contiguous(), ctx.bounds, native.ops()
        grads = [
            torch.empty_like(one) if need else None for one, need in zip(stacks, need_stacks, strict=True)
        ]
        d_weight_N = torch.zeros_like(weight_N) if need_weight else None
        dx_ND = empty_rows(x, token_N, bounds) if need_x else None
        if ops is not None and x.device.type == "cpu":
            routed, relu = (x, token_N, bounds), ctx.act == "relu"
            written = (dx_ND, grads, d_weight_N)
            ops.ffn_backward(*routed, stacks, relu, weight_N, h_NI, dy, *written, fast_dtype(x))
        else:
            zero_unvisited(grads, bounds)
            for e, start, end in groups(bounds):
                rows = slice(start, end)
                of_expert = [None if one is None else one[e] for one in grads]
                of_rows = [None if one is None else one[rows] for one in (weight_N, d_weight_N, dx_ND)]
                dtype = product_dtype(x, stacks[2], end - start)
                x_e, dy_e = (rows_of(one, token_N, rows, dtype) for one in (x, dy))
                own = [one[e].to(dtype) for one in stacks]
                _backward(x_e, dy_e, h_NI[rows].to(dtype), own, ctx.act, of_expert, *of_rows)
        dx = dx_ND if dx_ND is None or token_N is None else sum_pairs(x, token_N, dx_ND)
        return dx, None, None, *grads, d_weight_N, None


def _run(x: Tensor, token_N: Tensor | None, bounds: list[int], *rest: Any, h_NI: Tensor | None) -> Tensor:
    """The forward pass; pre-activations go to ``h_NI`` where a backward will need them."""
    *stacks, weight_N, act = rest
    ops, y_ND = native.ops(), empty_rows(x, token_N, bounds)
    if ops is not None and x.device.type == "cpu":
        ops.ffn_forward(x, token_N, bounds, stacks, act == "relu", weight_N, h_NI, y_ND, fast_dtype(x))
    else:
        for e, start, end in groups(bounds):
            rows = slice(start, end)
            dtype = product_dtype(x, stacks[2], end - start)
            up, up_b, down, down_b = (one[e].to(dtype) for one in stacks)
            h = torch.addmm(up_b, rows_of(x, token_N, rows, dtype), up.t())
            if h_NI is not None:
                h_NI[rows] = h
            y = torch.addmm(down_b, ACTS[act](h), down.t())
            y_ND[rows] = y if weight_N is None else y.mul_(weight_N[rows, None])
    return y_ND if token_N is None else sum_pairs(x, token_N, y_ND)


def _backward(
    x: Tensor,
    dy: Tensor,
    h: Tensor,
    own: list[Tensor],
    act: str,
    grads: list[Tensor | None],
    weight: Tensor | None,
    d_weight: Tensor | None,
    dx: Tensor | None,
) -> None:
    """One expert: gradients of what is wanted, into ``grads``, ``d_weight`` [n] and ``dx`` [n, H]."""
    up, _, down, down_b = own
    d_up, d_up_b, d_down, d_down_b = grads
    activation, da = ACTS[act](h), torch.mm(dy, down)
    if d_weight is not None:
        d_weight.copy_((da * activation).sum(1) + torch.mv(dy, down_b))
    if weight is not None:
        dy, da = dy * weight[:, None], da.mul_(weight[:, None])
    if d_down is not None:
        mm_into(d_down, dy.t(), activation)
    if d_down_b is not None:
        d_down_b.copy_(dy.sum(0))
    dh = _act_backward(act, da, h)
    if d_up is not None:
        mm_into(d_up, dh.t(), x)
    if d_up_b is not None:
        d_up_b.copy_(dh.sum(0))
    if dx is not None:
        mm_into(dx, dh, up)


def _act_backward(act: str, da: Tensor, h: Tensor) -> Tensor:
    aten = torch.ops.aten
    return aten.threshold_backward(da, h, 0) if act == "relu" else aten.gelu_backward(da, h)
