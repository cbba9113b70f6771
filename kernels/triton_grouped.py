"""Grouped GEMMs in Triton: rows times the matrix of their expert, and the gradient of those matrices.

Shapes: N rows sorted by expert, E experts, M tiles of rows (triton_routing.tile_map), K inner and C output
columns of a product. In kernels R, C and K are the rows, columns and inner elements of one step.

One program computes one tile of the output, in float32. Programs are numbered so that those which run at the
same time share rows and weights in the L2 cache. Row numbers are int64 before they are multiplied: N * H may
pass 2^31. An argument that is None leaves its part of the kernel out.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    """How a kernel cuts its product."""

    rows: int
    """rows of one program's output"""
    columns: int
    """columns of it"""
    inner: int
    """how far one step goes along the inner dimension"""
    warps: int
    """warps of one program"""
    stages: int
    """how many steps have room in shared memory, so that loads run ahead"""

    def options(self, dtype: torch.dtype, gathers: bool = False) -> dict[str, Any]:
        """The keyword arguments of a kernel that multiplies ``dtype``, and ``gathers`` rows in each step.

        float32 is multiplied as torch is set for its own matrix products: rounded to tf32, or as three
        products of tf32 parts, which gives float32 but for the last bits.
        """
        exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "INNER": self.inner,
            "PRECISION": "tf32x3" if exact else "tf32",
            "num_warps": self.warps,
            # where rows are gathered, Triton spends every other stage on loading the numbers of the rows
            "num_stages": 2 * self.stages - 1 if gathers else self.stages,
        }


def rows_times_weights(
    a: Tensor,
    token_N: Tensor | None,
    weights: Tensor,
    tiles_3M: Tensor,
    tile: Tile,
    transpose: bool = False,
) -> Tensor:
    """Each of N rows times its expert's matrix -> [N, C].

    ``a`` is [N, K], or [T, K] with ``token_N`` saying which of its rows each row is; ``weights`` is
    [E, K, C], or [E, C, K] with ``transpose``. Rows of nobody give zeros.
    """
    N, K = (a if token_N is None else token_N).shape[0], a.shape[1]
    C, M = weights.shape[1 if transpose else 2], tiles_3M.shape[1]
    out_NC, grid = a.new_empty(N, C), (M * triton.cdiv(C, tile.columns),)
    options = {"TRANSPOSE": transpose, **tile.options(a.dtype)}
    _rows_kernel[grid](a, token_N, weights, out_NC, tiles_3M, M, K, C, **options)
    return out_NC


def weight_gradient(
    left: Tensor,
    right: Tensor,
    offsets_E1: Tensor,
    tile: Tile,
    left_token_N: Tensor | None = None,
    right_token_N: Tensor | None = None,
) -> Tensor:
    """The sum over each expert's rows of left^T right: [N, L] and [N, C] -> [E, L, C], zeros for an expert
    without rows. A factor that comes with tokens is stored by token."""
    E, L, C = offsets_E1.shape[0] - 1, left.shape[1], right.shape[1]
    out_ELC, tokens = left.new_empty(E, L, C), (left_token_N, right_token_N)
    grid = (E * triton.cdiv(L, tile.rows) * triton.cdiv(C, tile.columns),)
    options = tile.options(left.dtype, gathers=tokens != (None, None))
    _weights_kernel[grid](left, right, *tokens, offsets_E1, out_ELC, L, C, **options)
    return out_ELC


@triton.jit
def place(program, rows, columns):
    """(row, column) of a program's tile among rows x columns: down eight rows, then to the next column."""
    block = program // (8 * columns)
    height = tl.minimum(rows - block * 8, 8)
    inside = program % (8 * columns)
    return block * 8 + inside % height, inside // height


@triton.jit
def tile_of(program, tiles, M, columns):
    """(expert, first row, end, block of columns) of a program, out of triton_routing.tile_map."""
    tile, block = place(program, M, columns)
    return tl.load(tiles + tile), tl.load(tiles + M + tile), tl.load(tiles + 2 * M + tile), block


@triton.jit
def source_rows(row, end, token):
    """Indices of the rows of a tile, int64; rows behind the end repeat the last one."""
    source = tl.minimum(row, end - 1).to(tl.int64)
    if token is not None:
        source = tl.load(token + source).to(tl.int64)
    return source


@triton.jit(do_not_specialize=["M"])
def _rows_kernel(
    a,
    token,
    weights,
    out,
    tiles,
    M,
    K,
    C,
    TRANSPOSE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    expert, first, end, block = tile_of(tl.program_id(0), tiles, M, tl.cdiv(C, COLUMNS))
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    # rows behind the end read the last row again; they are not written
    source = source_rows(row, end, token)
    a_RK = a + source[:, None] * K + inner[None, :]
    weights += expert.to(tl.int64) * K * C
    if TRANSPOSE:
        weights_KC = weights + inner[:, None] + column[None, :] * K
        step = INNER
    else:
        weights_KC = weights + inner[:, None] * C + column[None, :]
        step = INNER * C
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, tl.where(expert < 0, 0, K), INNER):
        left = tl.load(a_RK, mask=(inner < K - k)[None, :], other=0.0)
        right = tl.load(weights_KC, mask=(inner < K - k)[:, None] & (column < C)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_RK += INNER
        weights_KC += step
    out_RC = out + row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(out_RC, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < C)[None, :])


@triton.jit
def _weights_kernel(
    left,
    right,
    left_token,
    right_token,
    offsets,
    out,
    L,
    C,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    per_expert = tl.cdiv(L, ROWS) * tl.cdiv(C, COLUMNS)
    expert = tl.program_id(0) // per_expert
    tile, block = place(tl.program_id(0) % per_expert, tl.cdiv(L, ROWS), tl.cdiv(C, COLUMNS))
    begin, end = tl.load(offsets + expert).to(tl.int32), tl.load(offsets + expert + 1).to(tl.int32)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(begin, end, INNER):
        n = first + tl.arange(0, INNER)
        mine = n < end
        left_n, right_n = n, n
        if left_token is not None:
            left_n = tl.load(left_token + n, mask=mine, other=0)
        if right_token is not None:
            right_n = tl.load(right_token + n, mask=mine, other=0)
        left_RK = left + left_n.to(tl.int64)[None, :] * L + row[:, None]
        right_KC = right + right_n.to(tl.int64)[:, None] * C + column[None, :]
        a = tl.load(left_RK, mask=mine[None, :] & (row < L)[:, None], other=0.0)
        b = tl.load(right_KC, mask=mine[:, None] & (column < C)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    out_RC = out + expert.to(tl.int64) * L * C + row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(out_RC, total.to(out.dtype.element_ty), mask=(row < L)[:, None] & (column < C)[None, :])
