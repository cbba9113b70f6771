"""Grouped two-layer FFN experts with biases: y = (act(x Wu^T + bu) Wd^T + bd) * weight, each row through the
expert of its group.

Shapes: T tokens, N rows (token, expert pairs sorted by expert), E experts, H hidden, I intermediate.
up_proj [E, I, H], up_bias [E, I], down_proj [E, H, I], down_bias [E, H]; offsets_E1 [E+1] int64: expert e
owns rows offsets[e]..offsets[e+1]. These are the FFNs of detection transformers (ReLU) and of BERT-like ones
(GELU).

Two forms with equal results, as in swiglu.py: ``reference`` in plain autograd, and ``cpu``, one
autograd.Function that saves the input and the pre-activations and does no work for what is frozen.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from unimoe.errors import UserError

from .arguments import groups, needs_grad, prepare
from .dispatch import triton_form

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def ffn_experts(
    x_ND: Tensor,
    offsets_E1: Tensor,
    up_proj: Tensor,
    up_bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
    act: str = "relu",
    weight_N: Tensor | None = None,
) -> Tensor:
    """Runs every row through its expert.

    Args:
        x_ND: rows grouped by expert, [N, H]; rows past ``offsets_E1[-1]`` belong to nobody and give zeros.
        offsets_E1: [E+1] int64, starts with 0, never decreasing.
        up_proj, up_bias, down_proj, down_bias: [E, I, H], [E, I], [E, H, I], [E, H].
        act: ``relu`` or ``gelu`` (the exact one, by erf).
        weight_N: [N] factor of each row's output, biases included, or None for 1.

    Returns:
        [N, H] in x's dtype (autocast's dtype under autocast).

    Raises:
        UserError: another activation.
    """
    if act not in ACTS:
        raise UserError(f"FFN experts got the activation {act!r}, expected one of {', '.join(ACTS)}")
    stacks = (up_proj, up_bias, down_proj, down_bias)
    form, x_ND, stacks, weight_N = prepare("ffn_experts", x_ND, stacks, weight_N)
    with torch.autocast(x_ND.device.type, enabled=False):
        if form == "triton":
            return triton_form("ffn_experts")(x_ND, offsets_E1, *stacks, act, weight_N)
        if form == "reference":
            return ffn_experts_reference(x_ND, offsets_E1, *stacks, act, weight_N)
        stacks = [one.to(x_ND.dtype) for one in stacks]
        keep = needs_grad(x_ND, *stacks, weight_N)
        return _FFN.apply(x_ND, offsets_E1.tolist(), *stacks, act, weight_N, keep)


def ffn_mix(
    x_TD: Tensor,
    token_N: Tensor,
    offsets_E1: Tensor,
    up_proj: Tensor,
    up_bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
    act: str,
    weight_N: Tensor,
) -> Tensor:
    """Every token through its experts, weighted and summed: [T, H] -> [T, H], as ``swiglu_mix`` does."""
    y_ND = ffn_experts(
        x_TD.index_select(0, token_N), offsets_E1, up_proj, up_bias, down_proj, down_bias, act, weight_N
    )
    return torch.zeros_like(x_TD, dtype=y_ND.dtype).index_add(0, token_N, y_ND)


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
    """The same as ``ffn_experts``, one expert after the other in plain autograd."""
    sizes = [*offsets_E1.diff().tolist(), x_ND.shape[0] - int(offsets_E1[-1])]
    rows = x_ND.split(sizes)
    weights = [None] * len(sizes) if weight_N is None else weight_N.split(sizes)
    stacks = [stack.unbind(0) for stack in (up_proj, up_bias, down_proj, down_bias)]
    outputs = []
    for x, weight, (up, up_b, down, down_b) in zip(rows, weights, zip(*stacks, strict=True), strict=False):
        y = F.linear(ACTS[act](F.linear(x, up, up_b)), down, down_b)
        outputs.append(y if weight is None else y * weight[:, None])
    return torch.cat([*outputs, torch.zeros_like(rows[-1])])


class _FFN(torch.autograd.Function):
    """The cpu form. Saved for backward: x [N, H], pre-activations [N, I], and the weights by reference."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        bounds: list[int],
        up: Tensor,
        up_b: Tensor,
        down: Tensor,
        down_b: Tensor,
        act: str,
        weight_N: Tensor | None,
        keep: bool,
    ) -> Tensor:
        x_ND = x_ND.contiguous()
        h_NI = x_ND.new_empty(x_ND.shape[0], down.shape[2])
        y_ND = torch.empty_like(x_ND)
        y_ND[bounds[-1] :] = 0
        for e, start, end in groups(bounds):
            h, y = h_NI[start:end], y_ND[start:end]
            torch.addmm(up_b[e], x_ND[start:end], up[e].t(), out=h)
            torch.addmm(down_b[e], ACTS[act](h), down[e].t(), out=y)
            if weight_N is not None:
                y.mul_(weight_N[start:end, None])
        if keep:
            ctx.bounds, ctx.act = bounds, act
            ctx.save_for_backward(x_ND, h_NI, up, up_b, down, down_b, weight_N)
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, h_NI, up, up_b, down, down_b, weight_N = ctx.saved_tensors
        need_x, _, *need_stacks, _, need_weight, _ = ctx.needs_input_grad
        dy_ND = dy_ND.contiguous()
        d_up, d_up_b, d_down, d_down_b = (
            torch.zeros_like(stack) if need else None
            for stack, need in zip((up, up_b, down, down_b), need_stacks, strict=True)
        )
        d_weight_N = torch.zeros_like(weight_N) if need_weight else None
        dx_ND = torch.empty_like(x_ND) if need_x else None
        if dx_ND is not None:
            dx_ND[ctx.bounds[-1] :] = 0
        for e, start, end in groups(ctx.bounds):
            x, dy, h = x_ND[start:end], dy_ND[start:end], h_NI[start:end]
            activation = ACTS[ctx.act](h)
            da = torch.mm(dy, down[e])
            if d_weight_N is not None:
                d_weight_N[start:end] = (da * activation).sum(1) + torch.mv(dy, down_b[e])
            if weight_N is not None:
                dy, da = dy * weight_N[start:end, None], da.mul_(weight_N[start:end, None])
            if d_down is not None:
                torch.mm(dy.t(), activation, out=d_down[e])
            if d_down_b is not None:
                torch.sum(dy, 0, out=d_down_b[e])
            dh = _act_backward(ctx.act, da, h)
            if d_up is not None:
                torch.mm(dh.t(), x, out=d_up[e])
            if d_up_b is not None:
                torch.sum(dh, 0, out=d_up_b[e])
            if dx_ND is not None:
                torch.mm(dh, up[e], out=dx_ND[start:end])
        return dx_ND, None, d_up, d_up_b, d_down, d_down_b, None, d_weight_N, None


def _act_backward(act: str, da: Tensor, h: Tensor) -> Tensor:
    aten = torch.ops.aten
    return aten.threshold_backward(da, h, 0) if act == "relu" else aten.gelu_backward(da, h)
