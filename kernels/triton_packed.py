"""Products of packed weights in Triton (packed.py): codes are unpacked in registers, each expert's with bits
of its own.

Shapes: T tokens, N rows sorted by expert, E experts, G groups of a row, H hidden, I intermediate, B blocks of
16 rows of a matrix, C = 16 B output columns, M tiles of rows. In the kernel R, K and C are the rows, inner
columns and output columns of one step.

Activations have 8 bits, so a step multiplies integers of 8 bits, and results equal the other forms' but for
the order of the sum over groups.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .packed import CHUNK, LANES, Stack, filled, middle, plane_widths, quantize_rows
from .swiglu import GATES
from .triton_grouped import source_rows, tile_of
from .triton_routing import by_token, combine, tile_map


class Tile(NamedTuple):
    """How a product is cut."""

    rows: int
    columns: int
    warps: int
    stages: int


TILES = {16: Tile(16, 64, 4, 3), None: Tile(64, 64, 4, 3)}
"""Tile for the most rows of an expert; set by hand, without a GPU. None spills registers on compute
capability 9.0 (tests/kernels/test_triton_compiled.py)."""


def packed_linear(x: Tensor, stack: Stack, bias: Tensor | None = None, level: int = 0) -> Tensor:
    """:func:`unimoe.kernels.packed.linear`."""
    x_NK = x.reshape(-1, stack.width)
    offsets = torch.tensor([0, x_NK.shape[0]], device=x.device)
    y_NP = product(x_NK, None, offsets, stack, level)[:, : stack.rows]
    y_NP = y_NP if bias is None else y_NP + bias
    return y_NP.to(x.dtype).unflatten(0, x.shape[:-1])


def packed_experts(
    x_TH: Tensor,
    token_N: Tensor,
    offsets_E1: Tensor,
    weight_N: Tensor,
    gate_up: Stack,
    down: Stack,
    act: str = "silu",
    level: int = 0,
) -> Tensor:
    """:func:`unimoe.kernels.packed.fused_experts`."""
    h_NC = product(x_TH, token_N, offsets_E1, gate_up, level)
    gate, up = h_NC.unflatten(1, (-1, 2, LANES)).unbind(2)  # their blocks take turns
    act_NI = (GATES[act](gate) * up).flatten(1)[:, : down.width]
    y_NH = product(act_NI, None, offsets_E1, down, level)[:, : down.rows] * weight_N[:, None]
    return combine(y_NH.contiguous(), *by_token(token_N, x_TH.shape[0])).to(x_TH.dtype)


def product(x: Tensor, token_N: Tensor | None, offsets_E1: Tensor, stack: Stack, level: int = 0) -> Tensor:
    """Each of N rows times its expert's matrix -> [N, C] float32, columns as they are stored.

    ``x`` is [N, width], or [T, width] with ``token_N`` saying which of its rows each row is.
    """
    N, E, G = (x if token_N is None else token_N).shape[0], len(stack.bits), stack.width // stack.group
    B, chunks = stack.scales.shape[1], filled(stack.group) // CHUNK
    q, x_scale = quantize_rows(x, stack.group)
    x_codes = F.pad(q, (0, chunks * CHUNK - stack.group)).to(torch.int8).contiguous()
    table, numbers = tables(stack, level, x.device)
    tile = TILES[16] if N <= 16 * E else TILES[None]
    tiles_3M = tile_map(offsets_E1, N, tile.rows)
    out_NC, M = x.new_empty(N, B * LANES, dtype=torch.float32), tiles_3M.shape[1]
    grid = (M * triton.cdiv(B * LANES, tile.columns),)
    options: dict[str, Any] = {
        "CHUNKS": chunks,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    _packed_kernel[grid](
        stack.codes,
        stack.scales.view(torch.float16),
        table,
        numbers,
        x_codes,
        x_scale,
        q.sum(-1),
        token_N,
        out_NC,
        tiles_3M,
        M,
        G,
        B,
        **options,
    )
    return out_NC


def tables(stack: Stack, level: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernel must know of each matrix: [E, 7] int64 where its codes begin, number of planes, their
    widths; [E, 3] float32 what is subtracted from codes of 8 bits so that they are signed, what from the
    product, and the factor of its scales."""
    places, numbers = [], []
    for start, bits in zip(stack.starts(), stack.bits, strict=False):
        widths, have = plane_widths(bits, stack.nested, level)
        places.append([start, len(widths), *widths, *[0] * (5 - len(widths))])
        zero, step = middle(bits, have)
        signed = 128.0 if have == 8 else 0.0
        numbers.append([signed, zero - signed, step])
    return torch.tensor(places, device=device), torch.tensor(numbers, device=device)


@triton.jit(do_not_specialize=["M"])
def _packed_kernel(
    codes,
    scales,
    table,
    numbers,
    x_codes,
    x_scale,
    x_sum,
    token,
    out,
    tiles,
    M,
    G,
    B,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    expert, first, end, part = tile_of(tl.program_id(0), tiles, M, tl.cdiv(B * 16, COLUMNS))
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, 32)
    source = source_rows(row, end, token)
    e = tl.maximum(expert, 0)
    begin = tl.load(table + e * 7)
    planes = tl.load(table + e * 7 + 1).to(tl.int32)
    signed = tl.load(numbers + e * 3).to(tl.int32)
    zero = tl.load(numbers + e * 3 + 1)
    step = tl.load(numbers + e * 3 + 2)
    block = tl.minimum(column // 16, B - 1).to(tl.int64)  # columns behind the end are not written
    four = inner // 4
    place_KC = (column % 16 * 4)[None, :] + (inner % 4)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for g in range(tl.where(expert < 0, 0, G)):
        whole = tl.zeros([ROWS, COLUMNS], tl.int32)
        for chunk in range(CHUNKS):
            x_RK = x_codes + (source[:, None] * G + g) * (CHUNKS * 32) + chunk * 32 + inner[None, :]
            rows = tl.load(x_RK)
            unpacked = tl.zeros([32, COLUMNS], tl.int32)
            plane = begin
            for p in range(planes):
                width = tl.load(table + e * 7 + 2 + p).to(tl.int32)
                each = 8 // width
                at_C = plane + ((block * G + g) * CHUNKS + chunk) * (width * 64)
                byte = tl.load(codes + at_C[None, :] + (four // each * 64)[:, None] + place_KC).to(tl.int32)
                bits = byte >> (four % each * width)[:, None] & (1 << width) - 1
                unpacked = unpacked << width | bits
                plane += B.to(tl.int64) * G * CHUNKS * width * 64
            whole = tl.dot(rows, (unpacked - signed).to(tl.int8), whole)
        scale = tl.load(scales + ((e * B + block) * G + g) * 16 + column % 16).to(tl.float32) * step
        by_row = tl.load(x_scale + source * G + g)
        less = zero * tl.load(x_sum + source * G + g)
        total += by_row[:, None] * scale[None, :] * (whole.to(tl.float32) - less[:, None])
    out_RC = out + row.to(tl.int64)[:, None] * (B * 16) + column[None, :]
    tl.store(out_RC, total, mask=(row < end)[:, None] & (column < B * 16)[None, :])
