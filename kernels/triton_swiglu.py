"""Grouped SwiGLU experts in Triton: ``fused_experts`` of swiglu.py for CUDA.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, H hidden, I intermediate, M tiles.

Forward: a grouped GEMM that gathers its rows and ends in silu(gate) * up * weight, one by down_proj, and the
sum of each token's pairs. Backward: dy back through down_proj, then through the activation, which is computed
again from the pre-activations (the routing weight's gradient is the row sum of dA * A: Guo et al., SonicMoE,
arXiv 2512.14080), then a grouped GEMM each for the gradients of the rows, gate_up_proj and down_proj, as far
as they are wanted. Kept for backward: x, the pre-activations [N, 2I], and the routing as integers.

No kernel waits for the host and none uses atomics: a CUDA graph can capture them, and two runs agree bit for
bit. Each pass is a torch custom op, so that torch.compile takes it as it is.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import needs_grad
from .triton_grouped import Tile, rows_times_weights, source_rows, tile_of, weight_gradient
from .triton_routing import by_token, combine, tile_bound, tile_map


class Tiles(NamedTuple):
    """How the products of one size of problem are cut; ``gate_up`` and ``rows`` share one map of tiles and so
    their number of rows."""

    gate_up: Tile
    """x by gate_up_proj: two accumulators of this size"""
    rows: Tile
    """the other products with a row per pair"""
    weights: Tile
    """the gradients of the weights"""


TILES = {
    # (rows per expert up to, bytes of an element)
    (16, 2): Tiles(Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4), Tile(128, 128, 16, 8, 3)),
    (128, 2): Tiles(Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 4), Tile(128, 128, 32, 8, 3)),
    (None, 2): Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
    (16, 4): Tiles(Tile(16, 32, 64, 4, 4), Tile(16, 64, 64, 4, 4), Tile(128, 128, 16, 8, 3)),
    (None, 4): Tiles(Tile(64, 64, 32, 4, 3), Tile(64, 128, 32, 8, 3), Tile(128, 64, 32, 8, 3)),
}
"""How each size of problem is cut; the first entry that fits. Set by hand for compute capability 9.0 (H100),
where none of them spills registers (tests/kernels/test_triton_compiled.py)."""


def tiles_for(num_rows: int, num_experts: int, dtype: torch.dtype) -> Tiles:
    """The entry of TILES for N rows of E experts."""
    fitting = [
        tiles
        for (most, itemsize), tiles in TILES.items()
        if itemsize == dtype.itemsize and (most is None or num_rows <= most * num_experts)
    ]
    return fitting[0]


def fused_experts(
    x: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weight_N: Tensor | None = None,
    token_N: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """:func:`~unimoe.kernels.swiglu.fused_experts`, whose arguments and result it has, in bfloat16, float16
    or float32. With ``token_N`` it neither stores the gathered rows nor sums by atomics."""
    keep = needs_grad(x, gate_up_proj, down_proj, weight_N)
    return _SwiGLU.apply(x, token_N, offsets_E1, gate_up_proj, down_proj, weight_N, keep, act)


class _SwiGLU(torch.autograd.Function):
    """Forward and backward pass; without ``token_N`` the rows of x are the pairs and nothing is summed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_N: Tensor | None,
        offsets_E1: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weight_N: Tensor | None,
        keep: bool,
        act: str,
    ) -> Tensor:
        y, h_NF, tiles_3M, order_N, start_T1 = _forward(
            x, token_N, offsets_E1, gate_up, down, weight_N, keep, act
        )
        ctx.act = act
        if keep:
            routing = (token_N, offsets_E1, tiles_3M, order_N, start_T1)
            ctx.save_for_backward(x, gate_up, down, weight_N, h_NF, *routing)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, _, _, gate_up, down, weight, _, _ = ctx.needs_input_grad
        wanted = [x, gate_up, down, weight]
        grads = iter(_backward(dy, *ctx.saved_tensors, wanted, ctx.act))
        dx, d_gate_up, d_down, d_weight_N = (next(grads) if want else None for want in wanted)
        return dx, None, None, d_gate_up, d_down, d_weight_N, None, None


@torch.library.custom_op("unimoe_triton::swiglu_forward", mutates_args=())
def _forward(
    x: Tensor,
    token_N: Tensor | None,
    offsets_E1: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight_N: Tensor | None,
    keep: bool,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output and what backward needs: pre-activations (if ``keep``), map of tiles, and the pairs of each
    token (if there are tokens)."""
    N, (E, H, I) = (x if token_N is None else token_N).shape[0], down.shape  # noqa: E741
    tiles = tiles_for(N, E, x.dtype)
    with torch.cuda.device_of(x):
        x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
        weight_N = None if weight_N is None else weight_N.contiguous()
        tiles_3M = tile_map(offsets_E1, N, tiles.gate_up.rows)
        M = tiles_3M.shape[1]
        h_NF, act_NI = x.new_empty(N if keep else 0, 2 * I), x.new_empty(N, I)
        grid = (M * triton.cdiv(I, tiles.gate_up.columns),)
        kept, options = h_NF if keep else None, {"ACT": act, **tiles.gate_up.options(x.dtype)}
        _gate_up_kernel[grid](x, token_N, weight_N, gate_up, kept, act_NI, tiles_3M, M, H, I, **options)
        y_NH = rows_times_weights(act_NI, None, down, tiles_3M, tiles.rows, transpose=True)
        if token_N is None:
            return y_NH, h_NF, tiles_3M, tiles_3M.new_empty(0), tiles_3M.new_empty(0)
        order_N, start_T1 = by_token(token_N, x.shape[0])
        return combine(y_NH, order_N, start_T1), h_NF, tiles_3M, order_N, start_T1


@_forward.register_fake
def _(x, token_N, offsets_E1, gate_up, down, weight_N, keep, act):
    N, (E, _, I) = (x if token_N is None else token_N).shape[0], down.shape  # noqa: E741
    M = tile_bound(N, E, tiles_for(N, E, x.dtype).gate_up.rows)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h_NF = x.new_empty(N if keep else 0, 2 * I)
    tiles_3M = offsets_E1.new_empty(3, M, dtype=torch.int32)
    if token_N is None:
        return y, h_NF, tiles_3M, tiles_3M.new_empty(0), tiles_3M.new_empty(0)
    return y, h_NF, tiles_3M, torch.empty_like(token_N), tiles_3M.new_empty(x.shape[0] + 1)


@torch.library.custom_op("unimoe_triton::swiglu_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight_N: Tensor | None,
    h_NF: Tensor,
    token_N: Tensor | None,
    offsets_E1: Tensor,
    tiles_3M: Tensor,
    order_N: Tensor,
    start_T1: Tensor,
    wanted: list[bool],
    act: str,
) -> list[Tensor]:
    """The wanted ones of the gradients of x, gate_up, down and weight_N."""
    N, (E, _, I) = h_NF.shape[0], down.shape  # noqa: E741
    tiles = tiles_for(N, E, x.dtype)
    want_x, want_gate_up, want_down, want_weight = wanted
    dx = d_gate_up = d_down = None
    with torch.cuda.device_of(x):
        dy, x, gate_up, down = dy.contiguous(), x.contiguous(), gate_up.contiguous(), down.contiguous()
        weight_N = None if weight_N is None else weight_N.contiguous()
        act_NI = rows_times_weights(dy, token_N, down, tiles_3M, tiles.rows)  # dA until the next kernel
        dh_NF = torch.empty_like(h_NF)
        d_weight_N = torch.empty_like(weight_N) if weight_N is not None and want_weight else None
        columns = min(1024, triton.next_power_of_2(I))
        cut: Any = {"ROWS": max(1, 2048 // columns), "COLUMNS": columns, "ACT": act}
        _swiglu_backward_kernel[(triton.cdiv(N, cut["ROWS"]),)](
            h_NF, weight_N, offsets_E1, act_NI, dh_NF, d_weight_N, N, E, I, **cut
        )
        if want_down:
            d_down = weight_gradient(dy, act_NI, offsets_E1, tiles.weights, left_token_N=token_N)
        del act_NI  # makes room for the rows' gradient, the largest temporary
        if want_gate_up:
            d_gate_up = weight_gradient(dh_NF, x, offsets_E1, tiles.weights, right_token_N=token_N)
        if want_x:
            dx = rows_times_weights(dh_NF, None, gate_up, tiles_3M, tiles.rows)
            if token_N is not None:
                dx = combine(dx, order_N, start_T1)
    return [grad for grad in (dx, d_gate_up, d_down, d_weight_N) if grad is not None]


@_backward.register_fake
def _(dy, x, gate_up, down, weight_N, *args):
    leaves = (x, gate_up, down, weight_N)
    kept = (leaf for leaf, want in zip(leaves, args[-2], strict=True) if want)
    return [torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in kept]


@triton.jit
def _factor(gate, ACT: tl.constexpr):
    """act(gate) / gate: a sigmoid for SiLU and for GELU by tanh, since (1 + tanh(u)) / 2 = sigmoid(2u); the
    normal distribution's for the exact GELU."""
    if ACT == "silu":
        factor = tl.sigmoid(gate)
    elif ACT == "gelu_tanh":
        factor = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2 sqrt(2 / pi)
    else:
        factor = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    return factor


@triton.jit
def _slope(gate, factor, ACT: tl.constexpr):
    """The derivative of ``_factor`` by the gate."""
    if ACT == "silu":
        slope = factor * (1 - factor)
    elif ACT == "gelu_tanh":
        slope = factor * (1 - factor) * 1.5957691216057308 * (1 + 0.134145 * gate * gate)
    else:
        slope = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)  # 1 / sqrt(2 pi)
    return slope


@triton.jit(do_not_specialize=["M"])
def _gate_up_kernel(
    x,
    token,
    weight,
    gate_up,
    h,
    act,
    tiles,
    M,
    H,
    I,  # noqa: E741
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    expert, first, end, block = tile_of(tl.program_id(0), tiles, M, tl.cdiv(I, COLUMNS))
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    # rows and columns behind the end repeat the last one; what they give is not written
    source = source_rows(row, end, token)
    x_RK = x + source[:, None] * H + inner[None, :]
    gate_up += expert.to(tl.int64) * 2 * I * H
    gate_KC = gate_up + tl.minimum(column, I - 1)[None, :] * H + inner[:, None]
    up_KC = gate_KC + I * H
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, tl.where(expert < 0, 0, H), INNER):
        rows = tl.load(x_RK, mask=(inner < H - k)[None, :], other=0.0)
        gate_weights = tl.load(gate_KC, mask=(inner < H - k)[:, None], other=0.0)
        up_weights = tl.load(up_KC, mask=(inner < H - k)[:, None], other=0.0)
        gate = tl.dot(rows, gate_weights, gate, input_precision=PRECISION)
        up = tl.dot(rows, up_weights, up, input_precision=PRECISION)
        x_RK += INNER
        gate_KC += INNER
        up_KC += INNER
    mask = (row < end)[:, None] & (column < I)[None, :]
    row = row.to(tl.int64)
    # rounded here, so that backward sees the same values (and for fewer registers)
    gate, up = gate.to(act.dtype.element_ty), up.to(act.dtype.element_ty)
    if h is not None:
        h_RC = h + row[:, None] * 2 * I + column[None, :]
        tl.store(h_RC, gate, mask=mask)
        tl.store(h_RC + I, up, mask=mask)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    a = gate * _factor(gate, ACT) * up
    if weight is not None:
        a *= tl.load(weight + row, mask=(row < end) & (expert >= 0), other=0.0).to(tl.float32)[:, None]
    tl.store(act + row[:, None] * I + column[None, :], a.to(act.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "E"])
def _swiglu_backward_kernel(
    h,
    weight,
    offsets,
    da,
    dh,
    d_weight,
    N,
    E,
    I,  # noqa: E741
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    w = tl.full([ROWS], 1.0, tl.float32)
    if weight is not None:  # rows of nobody have no weight, not even a NaN
        w = tl.load(weight + row, mask=row < tl.load(offsets + E), other=0.0).to(tl.float32)
    dot = tl.zeros([ROWS], tl.float32)
    for first in range(0, I, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < N)[:, None] & (column < I)[None, :]
        h_RC = row[:, None] * 2 * I + column[None, :]
        da_RC = da + row[:, None] * I + column[None, :]
        gate = tl.load(h + h_RC, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + h_RC + I, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(da_RC, mask=mask, other=0.0).to(tl.float32)
        factor = _factor(gate, ACT)
        gated = gate * factor
        dot += tl.sum(d * gated * up, 1)
        d *= w[:, None]
        d_gate = d * up * (factor + gate * _slope(gate, factor, ACT))
        tl.store(dh + h_RC, d_gate.to(dh.dtype.element_ty), mask=mask)
        tl.store(dh + h_RC + I, (d * gated).to(dh.dtype.element_ty), mask=mask)
        tl.store(da_RC, (w[:, None] * gated * up).to(da.dtype.element_ty), mask=mask)  # dA gives way to A
    if d_weight is not None:
        tl.store(d_weight + row, dot.to(d_weight.dtype.element_ty), mask=row < N)
