"""Grouped SwiGLU experts: y = (silu(x Wg^T) * (x Wu^T) * weight) Wd^T, each row through the expert of its
group; lora.py adds a low-rank adapter to every W.

Shapes: T tokens, N rows (token, expert pairs sorted by expert), E experts, H hidden, I intermediate, R rank,
F = 2I (gate rows first, then up). offsets_E1 [E+1] int64: expert e owns rows offsets[e]..offsets[e+1].

Weights have transformers' layout. Three forms with equal results: ``reference`` leaves the gradient to
autograd and is what float64 checks compare with; ``triton`` is in triton_swiglu.py; ``cpu`` is one
autograd.Function that saves the tokens, the pre-activations and nothing else, recomputes the activation, gets
the gradient of the routing weight from <dA, A> (Guo et al., SonicMoE, arXiv 2512.14080, eq. for dS), and does
no work for weights that are frozen. Stacked weights are never indexed under autograd: each W[e] would cost a
zero tensor as large as the stack. Its loop over experts is in C++ where that is built (native.py).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def fused_experts(
    x: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weight_N: Tensor | None = None,
    token_N: Tensor | None = None,
) -> Tensor:
    """Runs every pair through its expert; with ``token_N`` gather, experts and sum in one.

    Args:
        x: rows grouped by expert, [N, H]; with ``token_N`` tokens, [T, H].
        offsets_E1: [E+1] int64, starts with 0, never decreasing. Pairs past ``offsets_E1[-1]`` belong to no
            expert: their rows give zeros, and a sum leaves them out.
        gate_up_proj: [E, 2I, H], gate rows first.
        down_proj: [E, H, I].
        weight_N: [N] factor of each pair's output, or None for 1. It multiplies the activation, which is
            equivalent.
        token_N: [N] int64 token of each pair, pairs sorted by expert.

    Returns:
        [N, H] outputs of the rows, or [T, H] sums over the pairs of each token, zeros for a token without
        pairs; in x's dtype (autocast's dtype under autocast).
    """
    form, x, stacks, weight_N = prepare("fused_experts", x, (gate_up_proj, down_proj), weight_N)
    with without_autocast(x):
        if form == "triton":
            return triton_form("fused_experts")(x, offsets_E1, *stacks, weight_N, token_N)
        if form == "reference":
            run = partial(swiglu_experts_reference, weight_N=weight_N)
            return gather_and_sum(run, x, token_N, offsets_E1, *stacks)
        return grouped_swiglu(x, token_N, offsets_E1, Weights(*stacks), weight_N)


def swiglu_experts_reference(
    x_ND: Tensor, offsets_E1: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_N: Tensor | None = None
) -> Tensor:
    """``fused_experts`` on rows, one expert after the other in plain autograd."""

    def expert(x: Tensor, weight: Tensor | None, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        activation = F.silu(gate) * up
        return F.linear(activation if weight is None else activation * weight, down)

    return one_by_one(expert, x_ND, offsets_E1, (gate_up_proj, down_proj), weight_N)


class Weights(NamedTuple):
    """Parameters of all experts, or of one; or their gradients. The adapters are there all or none."""

    gate_up: Tensor | None
    """[E, 2I, H]"""
    down: Tensor | None
    """[E, H, I]"""
    A1: Tensor | None = None
    """[E, R, H], adapter of gate_up"""
    B1: Tensor | None = None
    """[E, 2I, R]"""
    A2: Tensor | None = None
    """[E, R, I], adapter of down"""
    B2: Tensor | None = None
    """[E, H, R]"""

    def expert(self, e: int, dtype: torch.dtype | None = None) -> Any:
        """Those of expert ``e`` (views, where ``dtype`` is None or theirs)."""
        return Weights(*(None if one is None else one[e].to(dtype or one.dtype) for one in self))


def grouped_swiglu(
    x: Tensor,
    token_N: Tensor | None,
    offsets_E1: Tensor,
    weights: Weights,
    weight_N: Tensor | None,
    scale: float = 1.0,
) -> Tensor:
    """The cpu form: rows [N, H] to rows where ``token_N`` is None, else tokens [T, H] to sums over pairs."""
    arguments = (x.contiguous(), token_N, offsets_E1.tolist(), *weights, weight_N, scale)
    if needs_grad(x, *weights, weight_N):
        return _SwiGLU.apply(*arguments)
    return _run(*arguments, h_2NI=None)


class _SwiGLU(torch.autograd.Function):
    """Saved for backward: x, pre-activations [2, N, I], and weights and routing by reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_N: Tensor | None, bounds: list[int], *rest: Any) -> Tensor:
        *stacks, weight_N, scale = rest
        # Gate and up lie in two blocks, not in two column halves: silu over contiguous memory rounds as a
        # dense layer's does.
        h_2NI = x.new_empty(2, bounds[-1], stacks[1].shape[2])
        ctx.bounds, ctx.scale = bounds, scale
        ctx.save_for_backward(x, token_N, h_2NI, weight_N, *stacks)
        return _run(x, token_N, bounds, *rest, h_2NI=h_2NI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, token_N, h_2NI, weight_N, *stacks = ctx.saved_tensors
        bounds, scale, weights = ctx.bounds, ctx.scale, Weights(*stacks)
        need_x, _, _, *need_stacks, need_weight, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        grads = Weights(
            *(torch.empty_like(one) if need else None for one, need in zip(stacks, need_stacks, strict=True))
        )
        d_weight_N = torch.zeros_like(weight_N) if need_weight else None
        dx_ND = empty_rows(x, token_N, bounds) if need_x else None
        ops = native.ops()
        if ops is not None and x.device.type == "cpu":
            adapters, d_adapters = [one for one in stacks[2:] if one is not None], list(grads[2:])
            arguments = (x, token_N, bounds, *weights[:2], adapters, scale, weight_N, h_2NI, dy)
            ops.swiglu_backward(*arguments, dx_ND, *grads[:2], d_adapters, d_weight_N, fast_dtype(x))
        else:
            zero_unvisited(grads, bounds)
            for e, start, end in groups(bounds):
                rows = slice(start, end)
                dtype = product_dtype(x, stacks[1], end - start)
                x_e, dy_e = (rows_of(one, token_N, rows, dtype) for one in (x, dy))
                weight, d_weight, dx = (
                    None if one is None else one[rows] for one in (weight_N, d_weight_N, dx_ND)
                )
                h = h_2NI[:, rows].to(dtype)
                _backward(
                    x_e, dy_e, h, weights.expert(e, dtype), weight, scale, grads.expert(e), d_weight, dx
                )
        dx = dx_ND if dx_ND is None or token_N is None else sum_pairs(x, token_N, dx_ND)
        return dx, None, None, *grads, d_weight_N, None


def _run(x: Tensor, token_N: Tensor | None, bounds: list[int], *rest: Any, h_2NI: Tensor | None) -> Tensor:
    """The forward pass; pre-activations go to ``h_2NI`` where a backward will need them."""
    *stacks, weight_N, scale = rest
    weights, ops, y_ND = Weights(*stacks), native.ops(), empty_rows(x, token_N, bounds)
    if ops is not None and x.device.type == "cpu":
        adapters = [one for one in stacks[2:] if one is not None]
        arguments = (x, token_N, bounds, *stacks[:2], adapters, scale, weight_N, h_2NI, y_ND)
        ops.swiglu_forward(*arguments, fast_dtype(x))
    else:
        for e, start, end in groups(bounds):
            rows = slice(start, end)
            dtype = product_dtype(x, stacks[1], end - start)
            x_e = rows_of(x, token_N, rows, dtype)
            weight = None if weight_N is None else weight_N[rows, None]
            h = x.new_empty(2, end - start, stacks[1].shape[2]) if h_2NI is None else h_2NI[:, rows]
            _forward(x_e, weights.expert(e, dtype), weight, scale, h, y_ND[rows])
    return y_ND if token_N is None else sum_pairs(x, token_N, y_ND)


def _forward(x: Tensor, w: Any, weight: Tensor | None, scale: float, h: Tensor, y: Tensor) -> None:
    """One expert: rows ``x`` [n, H] to pre-activations ``h`` [2, n, I] and outputs ``y`` [n, H]."""
    inner, (gate, up) = w.down.shape[1], h.to(x.dtype)
    torch.mm(x, w.gate_up[:inner].t(), out=gate)
    torch.mm(x, w.gate_up[inner:].t(), out=up)
    if w.A1 is not None:
        xA = torch.mm(x, w.A1.t())
        gate.addmm_(xA, w.B1[:inner].t(), alpha=scale)
        up.addmm_(xA, w.B1[inner:].t(), alpha=scale)
    if h.dtype != x.dtype:
        h[0], h[1] = gate, up
    activation = F.silu(gate).mul_(up)
    if weight is not None:
        activation.mul_(weight)
    mm_into(y, activation, w.down.t())
    if w.A2 is not None:
        y += torch.mm(torch.mm(activation, w.A2.t()).mul_(scale), w.B2.t())


def _backward(
    x: Tensor,
    dy: Tensor,
    h: Tensor,
    w: Any,
    weight: Tensor | None,
    scale: float,
    grads: Any,
    d_weight: Tensor | None,
    dx: Tensor | None,
) -> None:
    """One expert: gradients of what is wanted, into ``grads``, ``d_weight`` [n] and ``dx`` [n, H]."""
    (gate, up), inner = h, w.down.shape[1]
    silu = F.silu(gate)
    activation, da = silu * up, torch.mm(dy, w.down)
    if w.B2 is not None:
        dyB = torch.mm(dy, w.B2)
        da.addmm_(dyB, w.A2, alpha=scale)
    if weight is not None:
        if d_weight is not None:
            d_weight.copy_((da * activation).sum(1))
        activation.mul_(weight[:, None])
        da.mul_(weight[:, None])
    if grads.down is not None:
        mm_into(grads.down, dy.t(), activation)
    if grads.A2 is not None:
        mm_into(grads.A2, dyB.t() * scale, activation)
    if grads.B2 is not None:
        mm_into(grads.B2, dy.t(), torch.mm(activation, w.A2.t()).mul_(scale))
    if dx is None and all(one is None for one in (grads.gate_up, grads.A1, grads.B1)):
        return
    dh = x.new_empty(x.shape[0], 2 * inner)
    swiglu_backward(da, gate, up, silu, dh[:, :inner], dh[:, inner:])
    if grads.gate_up is not None:
        mm_into(grads.gate_up, dh.t(), x)
    if grads.B1 is not None:
        mm_into(grads.B1, dh.t(), torch.mm(x, w.A1.t()).mul_(scale))
    if dx is not None:
        mm_into(dx, dh, w.gate_up)
    if w.B1 is not None and (dx is not None or grads.A1 is not None):
        dhB = torch.mm(dh, w.B1).mul_(scale)
        if grads.A1 is not None:
            mm_into(grads.A1, dhB.t(), x)
        if dx is not None:
            dx += torch.mm(dhB, w.A1)


def swiglu_backward(da: Tensor, gate: Tensor, up: Tensor, silu: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Gradient of silu(gate) * up into ``d_gate`` and ``d_up``, all [n, I]; ``da`` is overwritten."""
    torch.mul(da, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=d_gate)
