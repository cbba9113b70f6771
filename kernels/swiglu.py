"""Grouped SwiGLU experts: y = (silu(x Wg^T) * (x Wu^T) * weight) Wd^T, each row through the expert of its
group.

Shapes: N rows (token, expert pairs sorted by expert), E experts, H hidden, I intermediate, F = 2I (gate rows
first, then up). offsets_E1 [E+1] int64: expert e owns rows offsets[e]..offsets[e+1].

Weights have transformers' layout. Two forms with equal results: ``reference`` leaves the gradient to autograd
and is what float64 checks compare with; ``cpu`` is one autograd.Function that saves x, the pre-activations
and nothing else, recomputes the activation, gets the gradient of the routing weight from <dA, A> (Guo et al.,
SonicMoE, arXiv 2512.14080, eq. for dS), and does no work for weights that are frozen. Stacked weights are
never indexed under autograd: each W[e] would cost a zero tensor as large as the stack.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import choose, compute_dtype, triton_form


def swiglu_experts(
    x_ND: Tensor, offsets_E1: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_N: Tensor | None = None
) -> Tensor:
    """Runs every row through its expert.

    Args:
        x_ND: rows grouped by expert, [N, H]; rows past ``offsets_E1[-1]`` belong to nobody and give zeros.
        offsets_E1: [E+1] int64, starts with 0, never decreasing.
        gate_up_proj: [E, 2I, H], gate rows first.
        down_proj: [E, H, I].
        weight_N: [N] factor of each row's output, or None for 1. It is applied to the activation, which is
            the same thing.

    Returns:
        [N, H] in x's dtype (autocast's dtype under autocast).
    """
    dtype = compute_dtype(x_ND)
    with torch.autocast(x_ND.device.type, enabled=False):
        x_ND, gate_up_proj, down_proj = x_ND.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
        weight_N = None if weight_N is None else weight_N.to(dtype)
        form = choose("swiglu_experts", x_ND)
        if form == "triton":
            return triton_form("swiglu_experts")(x_ND, offsets_E1, gate_up_proj, down_proj, weight_N)
        if form == "reference":
            return swiglu_experts_reference(x_ND, offsets_E1, gate_up_proj, down_proj, weight_N)
        keep = needs_grad(x_ND, gate_up_proj, down_proj, weight_N)
        return _SwiGLU.apply(x_ND, offsets_E1.tolist(), gate_up_proj, down_proj, weight_N, keep)


def swiglu_mix(
    x_TD: Tensor,
    token_N: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weight_N: Tensor,
) -> Tensor:
    """Every token through its experts, weighted and summed: gather, ``swiglu_experts`` and sum in one.

    Args:
        x_TD: tokens, [T, H].
        token_N: [N] int64 token of each pair, pairs sorted by expert; pairs past ``offsets_E1[-1]`` are
            skipped.
        offsets_E1, gate_up_proj, down_proj: as in ``swiglu_experts``.
        weight_N: [N] factor of each pair.

    Returns:
        [T, H] in x's dtype (autocast's dtype under autocast); zeros for a token without pairs.
    """
    dtype = compute_dtype(x_TD)
    with torch.autocast(x_TD.device.type, enabled=False):
        x_TD, gate_up_proj, down_proj = x_TD.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
        weight_N = weight_N.to(dtype)
        if choose("swiglu_mix", x_TD) == "triton":
            return triton_form("swiglu_mix")(x_TD, token_N, offsets_E1, gate_up_proj, down_proj, weight_N)
        x_ND = x_TD.index_select(0, token_N)
        y_ND = swiglu_experts(x_ND, offsets_E1, gate_up_proj, down_proj, weight_N)
        return torch.zeros_like(x_TD).index_add(0, token_N, y_ND)


def swiglu_experts_reference(
    x_ND: Tensor, offsets_E1: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weight_N: Tensor | None = None
) -> Tensor:
    """The same as ``swiglu_experts``, one expert after the other in plain autograd."""
    bounds = offsets_E1.tolist()
    sizes = [end - start for start, end in pairwise(bounds)] + [x_ND.shape[0] - bounds[-1]]
    rows = x_ND.split(sizes)
    weights = [None] * len(sizes) if weight_N is None else weight_N.split(sizes)
    outputs = []
    for x, weight, gate_up, down in zip(
        rows, weights, gate_up_proj.unbind(0), down_proj.unbind(0), strict=False
    ):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        activation = F.silu(gate) * up
        if weight is not None:
            activation = activation * weight[:, None]
        outputs.append(F.linear(activation, down))
    return torch.cat([*outputs, torch.zeros_like(rows[-1])])


class _SwiGLU(torch.autograd.Function):
    """The cpu form. Saved for backward: x [N, H], pre-activations [2, N, I], and the weights by reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        bounds: list[int],
        gate_up: Tensor,
        down: Tensor,
        weight_N: Tensor | None,
        keep: bool,
    ) -> Tensor:
        x_ND = x_ND.contiguous()
        N, inner = x_ND.shape[0], down.shape[2]
        # Gate and up lie in two blocks, not in two column halves: silu over contiguous memory rounds as a
        # dense layer's does. Without a backward to come, one block for the busiest expert serves them all.
        h_2NI = x_ND.new_empty(2, N if keep else longest(bounds), inner)
        y_ND = torch.empty_like(x_ND)
        y_ND[bounds[-1] :] = 0
        for e, start, end in groups(bounds):
            x, rows = x_ND[start:end], slice(start, end) if keep else slice(0, end - start)
            gate, up = h_2NI[0, rows], h_2NI[1, rows]
            torch.mm(x, gate_up[e, :inner].t(), out=gate)
            torch.mm(x, gate_up[e, inner:].t(), out=up)
            activation = F.silu(gate).mul_(up)
            if weight_N is not None:
                activation.mul_(weight_N[start:end, None])
            torch.mm(activation, down[e].t(), out=y_ND[start:end])
        if keep:
            ctx.bounds = bounds
            ctx.save_for_backward(x_ND, h_2NI, gate_up, down, weight_N)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h_2NI, gate_up, down, weight_N = ctx.saved_tensors
        need_x, _, need_gate_up, need_down, need_weight, _ = ctx.needs_input_grad
        dy_ND = dy_ND.contiguous()
        N, inner = x_ND.shape[0], down.shape[2]
        dx_ND = torch.empty_like(x_ND) if need_x else None
        d_gate_up = torch.empty_like(gate_up) if need_gate_up else None
        d_down = torch.empty_like(down) if need_down else None
        d_weight_N = x_ND.new_zeros(N) if need_weight else None
        if dx_ND is not None:
            dx_ND[ctx.bounds[-1] :] = 0
        dh_F = x_ND.new_empty(longest(ctx.bounds), 2 * inner)
        for e, start, end in groups(ctx.bounds, with_empty=True):
            if start == end:  # an expert without rows: its gradient is exactly zero
                for grad in (d_gate_up, d_down):
                    if grad is not None:
                        grad[e].zero_()
                continue
            x, dy = x_ND[start:end], dy_ND[start:end]
            weight = None if weight_N is None else weight_N[start:end, None]
            gate, up = h_2NI[0, start:end], h_2NI[1, start:end]
            silu = F.silu(gate)
            da = torch.mm(dy, down[e])
            if d_weight_N is not None or d_down is not None:
                activation = silu * up
                if d_weight_N is not None:
                    torch.sum(da * activation, dim=1, out=d_weight_N[start:end])
                if d_down is not None:
                    torch.mm(dy.t(), activation if weight is None else activation.mul_(weight), out=d_down[e])
            if dx_ND is None and d_gate_up is None:
                continue
            if weight is not None:
                da.mul_(weight)
            dh = dh_F[: end - start]
            swiglu_backward(da, gate, up, silu, dh[:, :inner], dh[:, inner:])
            if d_gate_up is not None:
                torch.mm(dh.t(), x, out=d_gate_up[e])
            if dx_ND is not None:
                torch.mm(dh, gate_up[e], out=dx_ND[start:end])
        return dx_ND, None, d_gate_up, d_down, d_weight_N, None


def swiglu_backward(da: Tensor, gate: Tensor, up: Tensor, silu: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Gradient of silu(gate) * up into ``d_gate`` and ``d_up``, all [n, I]; ``da`` is overwritten."""
    torch.mul(da, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=d_gate)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward may come (inside a Function's forward grad mode is always off, so ask before)."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def groups(bounds: list[int], with_empty: bool = False) -> list[tuple[int, int, int]]:
    """(expert, start, end) for each expert that has rows, or for every expert."""
    spans = enumerate(pairwise(bounds))
    return [(e, start, end) for e, (start, end) in spans if with_empty or end > start]


def longest(bounds: list[int]) -> int:
    """Rows of the busiest expert: how much scratch one expert at a time needs."""
    return max((end - start for start, end in pairwise(bounds)), default=0)
