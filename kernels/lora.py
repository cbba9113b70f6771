"""SwiGLU experts with a low-rank adapter per expert: W_e = W + scale * B_e A_e, never materialised.

Shapes: T tokens, N (token, expert) pairs sorted by expert, n rows of one expert, E experts, R rank, H hidden,
I intermediate. Adapters: A_gate_up [E, R, H], B_gate_up [E, 2I, R], A_down [E, R, I], B_down [E, H, R].

``lora_experts``, ``lora_mix``: every expert has a base of its own.
``shared_lora_experts``: all experts share one base FFN (MixLoRA, arXiv 2404.15159). The base then runs once
per token, whatever k is: gate and up before the adapters, down after the sum, since sum_e w_e (W + dW_e) a_e
= W (sum_e w_e a_e) + sum_e w_e dW_e a_e.

The cpu forms (the first is swiglu.py's) are one autograd.Function each. They save the input and the
pre-activations, recompute the rest, and do no work for what is frozen: with frozen bases, backward is the
input gradient and the narrow adapter products.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import groups, needs_grad, one_by_one, prepare, sum_pairs, without_autocast
from .swiglu import Weights, grouped_swiglu, swiglu_backward


class Adapters(NamedTuple):
    """The stacked adapters of all experts, shapes as above."""

    A_gate_up: Tensor
    B_gate_up: Tensor
    A_down: Tensor
    B_down: Tensor


def lora_experts(
    x_ND: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    adapters: Adapters,
    scale: float,
    weight_N: Tensor | None = None,
) -> Tensor:
    """``swiglu_experts`` (which see) of the adapted weights: [N, H] rows grouped by expert -> [N, H]."""
    stacks = (gate_up_proj, down_proj, *adapters)
    form, x_ND, stacks, weight_N = prepare("lora_experts", x_ND, stacks, weight_N)
    with without_autocast(x_ND):
        if form == "reference":
            gate_up, down, *lora = stacks
            return lora_experts_reference(x_ND, offsets_E1, gate_up, down, Adapters(*lora), scale, weight_N)
        return grouped_swiglu(x_ND, None, offsets_E1, Weights(*stacks), weight_N, scale)


def lora_mix(
    x_TD: Tensor,
    token_N: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    adapters: Adapters,
    scale: float,
    weight_N: Tensor,
) -> Tensor:
    """``swiglu_mix`` (which see) of the adapted weights: [T, H] tokens, weighted and summed -> [T, H]."""
    stacks = (gate_up_proj, down_proj, *adapters)
    form, x_TD, stacks, weight = prepare("lora_mix", x_TD, stacks, weight_N)
    with without_autocast(x_TD):
        if form == "reference":
            x_ND, (gate_up, down, *lora) = x_TD.index_select(0, token_N), stacks
            y_ND = lora_experts_reference(x_ND, offsets_E1, gate_up, down, Adapters(*lora), scale, weight)
            return sum_pairs(x_TD, token_N, y_ND)
        return grouped_swiglu(x_TD, token_N, offsets_E1, Weights(*stacks), weight, scale)


def lora_experts_reference(
    x_ND: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    adapters: Adapters,
    scale: float,
    weight_N: Tensor | None = None,
) -> Tensor:
    """The same as ``lora_experts``, one expert after the other in plain autograd."""

    def expert(x: Tensor, weight: Tensor | None, gate_up: Tensor, down: Tensor, *lora: Tensor) -> Tensor:
        A1, B1, A2, B2 = lora
        gate, up = (F.linear(x, gate_up) + scale * F.linear(F.linear(x, A1), B1)).chunk(2, dim=-1)
        activation = F.silu(gate) * up
        if weight is not None:
            activation = activation * weight
        return F.linear(activation, down) + scale * F.linear(F.linear(activation, A2), B2)

    return one_by_one(expert, x_ND, offsets_E1, (gate_up_proj, down_proj, *adapters), weight_N)


def shared_lora_experts(
    x_TD: Tensor,
    token_N: Tensor,
    offsets_E1: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    adapters: Adapters,
    scale: float,
    weight_N: Tensor | None = None,
) -> Tensor:
    """Experts that adapt one base FFN, weighted and summed per token.

    Args:
        x_TD: tokens, [T, H].
        token_N: [N] int64 token of each pair, pairs sorted by expert; all pairs belong to an expert.
        offsets_E1: [E+1] int64, expert e owns pairs ``offsets[e]..offsets[e+1]``.
        gate_proj, up_proj: [I, H]. down_proj: [H, I].
        weight_N: [N] factor of each pair, or None for 1.

    Returns:
        [T, H]; zeros for a token without pairs.
    """
    stacks = (gate_proj, up_proj, down_proj, *adapters)
    form, x_TD, stacks, weight_N = prepare("shared_lora_experts", x_TD, stacks, weight_N)
    with without_autocast(x_TD):
        gate, up, down, *lora = (one.to(x_TD.dtype) for one in stacks)
        adapters = Adapters(*lora)
        weight_N = x_TD.new_ones(token_N.shape) if weight_N is None else weight_N
        if form == "reference":
            E = offsets_E1.shape[0] - 1
            gate_up, down = torch.cat([gate, up]).expand(E, -1, -1), down.expand(E, -1, -1)
            x_ND = x_TD.index_select(0, token_N)
            y_ND = lora_experts_reference(x_ND, offsets_E1, gate_up, down, adapters, scale, weight_N)
            return sum_pairs(x_TD, token_N, y_ND)
        keep = needs_grad(x_TD, gate, up, down, *adapters, weight_N)
        bounds = offsets_E1.tolist()
        return _SharedLoRA.apply(x_TD, token_N, bounds, gate, up, down, *adapters, scale, weight_N, keep)


class _SharedLoRA(torch.autograd.Function):
    """Saved for backward: x [T, H], base pre-activations [2, T, I] (not N rows: the adapters are redone)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        token_N: Tensor,
        bounds: list[int],
        gate_proj: Tensor,
        up_proj: Tensor,
        down: Tensor,
        A1: Tensor,
        B1: Tensor,
        A2: Tensor,
        B2: Tensor,
        scale: float,
        weight_N: Tensor,
        keep: bool,
    ) -> Tensor:
        x_TD = x_TD.contiguous()
        T, inner = x_TD.shape[0], down.shape[1]
        h_2TI = x_TD.new_empty(2, T, inner)
        torch.mm(x_TD, gate_proj.t(), out=h_2TI[0])
        torch.mm(x_TD, up_proj.t(), out=h_2TI[1])
        mixed_TI, y_TD = x_TD.new_zeros(T, inner), torch.zeros_like(x_TD)
        for e, start, end in groups(bounds):
            token = token_N[start:end]
            gate, up = h_2TI[0].index_select(0, token), h_2TI[1].index_select(0, token)
            _adapt(gate, up, torch.mm(x_TD.index_select(0, token), A1[e].t()), B1[e], scale)
            activation = F.silu(gate).mul_(up).mul_(weight_N[start:end, None])
            mixed_TI.index_add_(0, token, activation)
            y_TD.index_add_(0, token, torch.mm(torch.mm(activation, A2[e].t()), B2[e].t()), alpha=scale)
        y_TD.addmm_(mixed_TI, down.t())
        if keep:
            ctx.bounds, ctx.scale = bounds, scale
            ctx.save_for_backward(x_TD, h_2TI, token_N, gate_proj, up_proj, down, A1, B1, A2, B2, weight_N)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, h_2TI, token_N, gate_proj, up_proj, down, A1, B1, A2, B2, weight_N = ctx.saved_tensors
        need_x, _, _, need_gate, need_up, need_down, *need_adapters, _, need_weight, _ = ctx.needs_input_grad
        scale, inner = ctx.scale, down.shape[1]
        dA1, dB1, dA2, dB2 = _zeros((A1, B1, A2, B2), need_adapters)
        d_weight_N = torch.zeros_like(weight_N) if need_weight else None
        dmixed_TI = torch.mm(dy_TD, down)
        dh_2TI = torch.zeros_like(h_2TI)
        dx_TD = torch.zeros_like(x_TD) if need_x else None
        mixed_TI = torch.zeros_like(dmixed_TI) if need_down else None
        for e, start, end in groups(ctx.bounds):
            token, weight = token_N[start:end], weight_N[start:end, None]
            x, dy = x_TD.index_select(0, token), dy_TD.index_select(0, token)
            xA = torch.mm(x, A1[e].t())
            gate, up = h_2TI[0].index_select(0, token), h_2TI[1].index_select(0, token)
            _adapt(gate, up, xA, B1[e], scale)
            silu = F.silu(gate)
            activation = silu * up
            dyB = torch.mm(dy, B2[e])
            da = dmixed_TI.index_select(0, token).addmm_(dyB, A2[e], alpha=scale)
            if d_weight_N is not None:
                torch.sum(da * activation, dim=1, out=d_weight_N[start:end])
            activation.mul_(weight)
            da.mul_(weight)
            if mixed_TI is not None:
                mixed_TI.index_add_(0, token, activation)
            if dA2 is not None:
                torch.mm(dyB.t(), activation, out=dA2[e]).mul_(scale)
            if dB2 is not None:
                dB2[e] = torch.mm(torch.mm(activation, A2[e].t()).t(), dy).t().mul_(scale)
            d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
            swiglu_backward(da, gate, up, silu, d_gate, d_up)
            dh_2TI[0].index_add_(0, token, d_gate)
            dh_2TI[1].index_add_(0, token, d_up)
            dhB = torch.mm(d_gate, B1[e, :inner]).addmm_(d_up, B1[e, inner:])
            if dA1 is not None:
                torch.mm(dhB.t(), x, out=dA1[e]).mul_(scale)
            if dB1 is not None:
                dB1[e, :inner] = torch.mm(xA.t(), d_gate).t().mul_(scale)
                dB1[e, inner:] = torch.mm(xA.t(), d_up).t().mul_(scale)
            if dx_TD is not None:
                dx_TD.index_add_(0, token, torch.mm(dhB, A1[e]), alpha=scale)
        if dx_TD is not None:
            dx_TD.addmm_(dh_2TI[0], gate_proj).addmm_(dh_2TI[1], up_proj)
        d_gate_proj = torch.mm(dh_2TI[0].t(), x_TD) if need_gate else None
        d_up_proj = torch.mm(dh_2TI[1].t(), x_TD) if need_up else None
        d_down = torch.mm(dy_TD.t(), mixed_TI) if mixed_TI is not None else None
        grads = (dx_TD, None, None, d_gate_proj, d_up_proj, d_down, dA1, dB1, dA2, dB2)
        return *grads, None, d_weight_N, None


def _adapt(gate: Tensor, up: Tensor, xA: Tensor, B: Tensor, scale: float) -> None:
    """Adds scale * xA B^T to the pre-activations [n, I] in place; ``B`` [2I, R] has the gate's rows first."""
    inner = gate.shape[1]
    gate.addmm_(xA, B[:inner].t(), alpha=scale)
    up.addmm_(xA, B[inner:].t(), alpha=scale)


def _zeros(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Room for the gradients of those that need one."""
    return [torch.zeros_like(one) if need else None for one, need in zip(tensors, needed, strict=True)]
