"""Grouped SwiGLU experts: y = (act(x Wg^T) * (x Wu^T) * weight) Wd^T, each row through the expert of its
group; lora.py adds a low-rank adapter to every W. ``act`` is SiLU unless it is named (GeGLU: Shazeer, arXiv
2002.05202).

Shapes: T tokens, N rows (token, expert pairs sorted by expert), E experts, H hidden, I intermediate, R rank,
F = 2I (gate rows first, then up). offsets_E1 [E+1] int64: expert e owns rows offsets[e]..offsets[e+1].

Weights have transformers' layout. Three forms with equal results: ``reference`` leaves the gradient to
autograd and is what float64 checks compare with; ``triton`` is in triton_swiglu.py; ``cpu`` is one
autograd.Function that saves the tokens, the pre-activations and nothing else, recomputes the activation, gets
the gradient of the routing weight from <dA, A> (Guo et al., SonicMoE, arXiv 2512.14080, eq. for dS), and does
no work for weights that are frozen. Stacked weights are never indexed under autograd: each W[e] would cost a
zero tensor as large as the stack. Its loop over experts is in C++ where that is built (native.py), for SiLU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activations of the gate: SiLU, the exact GELU (by erf), and its approximation by tanh."""


def fused_experts(
    x: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weight_N: Tensor | None = None,
    token_N: Tensor | None = None,
    act: str = "silu",
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
        act: of the gate, a name of ``GATES``.

    Returns:
        [N, H] outputs of the rows, or [T, H] sums over the pairs of each token, zeros for a token without
        pairs; in x's dtype (autocast's dtype under autocast).

    Raises:
        UserError: another activation.
    """
    check_gate(act)
    form, x, stacks, weight_N = prepare("fused_experts", x, (gate_up_proj, down_proj), weight_N)
    with without_autocast(x):
        if form == "triton":
            return triton_form("fused_experts")(x, offsets_E1, *stacks, weight_N, token_N, act)
        if form == "reference":
            run = partial(swiglu_experts_reference, weight_N=weight_N, act=act)
            return gather_and_sum(run, x, token_N, offsets_E1, *stacks)
        return grouped_swiglu(x, token_N, offsets_E1, Weights(*stacks), weight_N, act=act)


def check_gate(act: str) -> None:
    """

    Raises:
        UserError: ``act`` is no activation of ``GATES``.
    """
    if act not in GATES:
        raise UserError(f"SwiGLU experts got the activation {act!r}, expected one of {', '.join(GATES)}")


def swiglu_experts_reference(
    x_ND: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weight_N: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """``fused_experts`` on rows, one expert after the other in plain autograd."""

    def expert(x: Tensor, weight: Tensor | None, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        activation = GATES[act](gate) * up
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
        """Weights of expert ``e`` (views, where ``dtype`` is None or theirs)."""
        return Weights(*(None if one is None else one[e].to(dtype or one.dtype) for one in self))


def grouped_swiglu(
    x: Tensor,
    token_N: Tensor | None,
    offsets_E1: Tensor,
    weights: Weights,
    weight_N: Tensor | None,
    scale: float = 1.0,
    act: str = "silu",
) -> Tensor:
    """The cpu form: rows [N, H] to rows where ``token_N`` is None, else tokens [T, H] to sums over pairs."""
    arguments = (x.contiguous(), token_N, offsets_E1.tolist(), *weights, weight_N, scale, act)
    if needs_grad(x, *weights, weight_N):
        return _SwiGLU.apply(*arguments)
    return _run(*arguments, h_2NI=None)


class _SwiGLU(torch.autograd.Function):
    """Saved for backward: x, pre-activations [2, N, I], and weights and routing by reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_N: Tensor | None, bounds: list[int], *rest: Any) -> Tensor:
        *stacks, weight_N, scale, act = rest
        # Gate and up lie in two blocks, not in two column halves: silu over contiguous memory rounds as a
        # dense layer's does.
        h_2NI = x.new_empty(2, bounds[-1], stacks[1].shape[2])
        ctx.bounds, ctx.scale, ctx.act = bounds, scale, act
        ctx.save_for_backward(x, token_N, h_2NI, weight_N, *stacks)
        return _run(x, token_N, bounds, *rest, h_2NI=h_2NI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, token_N, h_2NI, weight_N, *stacks = ctx.saved_tensors
        bounds, scale, act, weights = ctx.bounds, ctx.scale, ctx.act, Weights(*stacks)
        need_x, _, _, *need_stacks, need_weight, _, _ = ctx.needs_input_grad
        dy = dy.contiguous()
        grads = Weights(
            *(torch.empty_like(one) if need else None for one, need in zip(stacks, need_stacks, strict=True))
        )
        d_weight_N = torch.zeros_like(weight_N) if need_weight else None
        dx_ND = empty_rows(x, token_N, bounds) if need_x else None
        ops = native_loop(x, act)
        if ops is not None:
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
                own, d_own = weights.expert(e, dtype), grads.expert(e)
                _backward(x_e, dy_e, h, own, weight, scale, act, d_own, d_weight, dx)
        dx = dx_ND if dx_ND is None or token_N is None else sum_pairs(x, token_N, dx_ND)
        return dx, None, None, *grads, d_weight_N, None, None


def _run(x: Tensor, token_N: Tensor | None, bounds: list[int], *rest: Any, h_2NI: Tensor | None) -> Tensor:
    """The forward pass; pre-activations go to ``h_2NI`` where a backward will need them."""
    *stacks, weight_N, scale, act = rest
    weights, ops, y_ND = Weights(*stacks), native_loop(x, act), empty_rows(x, token_N, bounds)
    if ops is not None:
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
            _forward(x_e, weights.expert(e, dtype), weight, scale, act, h, y_ND[rows])
    return y_ND if token_N is None else sum_pairs(x, token_N, y_ND)


def native_loop(x: Tensor, act: str) -> Any:
    """The loop over experts in C++, or None where the one below runs."""
    return native.ops() if x.device.type == "cpu" and act == "silu" else None


def _forward(x: Tensor, w: Any, weight: Tensor | None, scale: float, act: str, h: Tensor, y: Tensor) -> None:
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
    activation = GATES[act](gate).mul_(up)
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
    act: str,
    grads: Any,
    d_weight: Tensor | None,
    dx: Tensor | None,
) -> None:
    """One expert: gradients of what is wanted, into ``grads``, ``d_weight`` [n] and ``dx`` [n, H]."""
    (gate, up), inner = h, w.down.shape[1]
    gated = GATES[act](gate)
    activation, da = gated * up, torch.mm(dy, w.down)
    dyB = None if w.B2 is None else torch.mm(dy, w.B2)
    if dyB is not None:
        da.addmm_(dyB, w.A2, alpha=scale)
    if weight is not None:
        if d_weight is not None:
            d_weight.copy_((da * activation).sum(1))
        activation.mul_(weight[:, None])
        da.mul_(weight[:, None])
    if grads.down is not None:
        mm_into(grads.down, dy.t(), activation)
    if dyB is not None and grads.A2 is not None:
        mm_into(grads.A2, dyB.t() * scale, activation)
    if grads.B2 is not None:
        mm_into(grads.B2, dy.t(), torch.mm(activation, w.A2.t()).mul_(scale))
    if dx is None and all(one is None for one in (grads.gate_up, grads.A1, grads.B1)):
        return
    dh = x.new_empty(x.shape[0], 2 * inner)
    gate_backward(da, gate, up, gated, act, dh[:, :inner], dh[:, inner:])
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


def gate_backward(
    da: Tensor, gate: Tensor, up: Tensor, gated: Tensor, act: str, d_gate: Tensor, d_up: Tensor
) -> None:
    """Gradient of gated * up, gated = act(gate), into ``d_gate`` and ``d_up``, all [n, I]; ``da`` is
    overwritten."""
    torch.mul(da, gated, out=d_up)
    da.mul_(up)
    if act == "silu":
        torch.ops.aten.silu_backward.grad_input(da, gate, grad_input=d_gate)
    else:
        form = "tanh" if act == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(da, gate, approximate=form, grad_input=d_gate)
