"""What the Triton kernels must know about a routing, computed on the device.

Shapes: N (token, expert) pairs sorted by expert, E experts, T tokens, M tiles of a grouped GEMM, H hidden.

Nothing here waits for the GPU or depends on how many rows an expert got: grids and buffers have a size that
follows from the shapes alone, so a CUDA graph can capture it. No atomics, so two runs agree bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL = 2048
"""Up to so many pairs are ranked by comparing all with all in one kernel; more are sorted."""


def tile_bound(num_rows: int, num_experts: int, rows_per_tile: int) -> int:
    """How many tiles N rows of E experts can fill at most, each expert beginning a tile of its own; the rows
    behind the last expert's count as one expert more."""
    groups = num_experts + 1
    return min(num_rows, (num_rows + groups * (rows_per_tile - 1)) // rows_per_tile)


def tile_map(offsets_E1: Tensor, num_rows: int, rows_per_tile: int) -> Tensor:
    """Which rows each tile of a grouped GEMM covers: int32 [3, M] of expert, first row and end.

    Rows past ``offsets_E1[-1]`` get tiles too, with expert -1, so that kernels can write zeros there. Tiles
    that are not needed come last and are empty (row = end = 0).
    """
    num_experts = offsets_E1.shape[0] - 1
    tiles_3M = offsets_E1.new_empty((3, tile_bound(num_rows, num_experts, rows_per_tile)), dtype=torch.int32)
    if num_rows:
        groups, M = triton.next_power_of_2(num_experts + 1), tiles_3M.shape[1]
        cut: Any = {"GROUPS": groups, "BLOCK": max(1, 4096 // groups)}
        _tile_map_kernel[(triton.cdiv(M, cut["BLOCK"]),)](
            offsets_E1, tiles_3M, M, num_rows, num_experts, rows_per_tile, **cut
        )
    return tiles_3M


def by_token(token_N: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The pairs of each token: (order_N, start_T1), token t owns pairs ``order[start[t]..start[t+1]]``, the
    pairs of a token in ascending order."""
    if token_N.shape[0] <= SMALL and num_tokens <= SMALL:
        order_N = torch.empty_like(token_N)
        start_T1 = token_N.new_empty(num_tokens + 1, dtype=torch.int32)
        cut: Any = {"BLOCK": 32, "OTHERS": 128}
        grid = (triton.cdiv(max(token_N.shape[0], num_tokens + 1), cut["BLOCK"]),)
        _rank_kernel[grid](token_N, order_N, start_T1, token_N.shape[0], num_tokens, **cut)
        return order_N, start_T1
    sorted_N, order_N = torch.sort(token_N.to(torch.int32), stable=True)  # half the passes of int64
    edges = torch.arange(num_tokens + 1, dtype=torch.int32, device=token_N.device)
    return order_N, torch.searchsorted(sorted_N, edges, out_int32=True)


def combine(y_NH: Tensor, order_N: Tensor, start_T1: Tensor) -> Tensor:
    """[N, H] results of the pairs -> [T, H], summed per token in float32; the lists are those of
    ``by_token``."""
    (N, H), T = y_NH.shape, start_T1.shape[0] - 1
    out_TH = y_NH.new_empty(T, H)
    if out_TH.numel():
        # all pairs of a usual token at once, so that their loads are in flight together
        pairs = min(16, triton.next_power_of_2(triton.cdiv(max(N, 1), T)))
        cut: Any = {"PAIRS": pairs, "BLOCK": min(1024, triton.next_power_of_2(H))}
        _combine_kernel[(T, triton.cdiv(H, cut["BLOCK"]))](y_NH, order_N, start_T1, out_TH, H, **cut)
    return out_TH


@triton.jit(do_not_specialize=["M", "N", "E"])
def _tile_map_kernel(
    offsets, tiles, M, N, E, rows_per_tile, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    group = tl.arange(0, GROUPS)
    start = tl.load(offsets + group, mask=group <= E, other=0).to(tl.int32)
    end = tl.load(offsets + group + 1, mask=group < E, other=0).to(tl.int32)
    end = tl.where(group == E, N, end)  # the rows that belong to nobody
    last = tl.cumsum(tl.cdiv(end - start, rows_per_tile), 0)
    first = last - tl.cdiv(end - start, rows_per_tile)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = (tile[:, None] >= first[None, :]) & (tile[:, None] < last[None, :])
    row = start[None, :] + (tile[:, None] - first[None, :]) * rows_per_tile
    stop = tl.minimum(row + rows_per_tile, end[None, :])
    expert = tl.where(group < E, group, -1)
    tl.store(tiles + tile, tl.sum(tl.where(mine, expert[None, :], 0), 1), mask=tile < M)
    tl.store(tiles + M + tile, tl.sum(tl.where(mine, row, 0), 1), mask=tile < M)
    tl.store(tiles + 2 * M + tile, tl.sum(tl.where(mine, stop, 0), 1), mask=tile < M)


@triton.jit(do_not_specialize=["N", "T"])
def _rank_kernel(token, order, start, N, T, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    me = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(token + me, mask=me < N, other=0)
    rank = tl.zeros([BLOCK], tl.int32)
    below = tl.zeros([BLOCK], tl.int32)
    for first in range(0, N, OTHERS):
        you = first + tl.arange(0, OTHERS)
        yours = tl.load(token + you, mask=you < N, other=T)  # T: behind every token
        before = (yours[None, :] < mine[:, None]) | (
            (yours[None, :] == mine[:, None]) & (you[None, :] < me[:, None])
        )
        rank += tl.sum(before.to(tl.int32), 1)
        below += tl.sum((yours[None, :] < me[:, None]).to(tl.int32), 1)
    tl.store(order + rank, me, mask=me < N)
    tl.store(start + me, below, mask=me <= T)


@triton.jit
def _combine_kernel(y, order, start, out, H, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(start + token), tl.load(start + token + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(begin, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        row = tl.load(order + pair, mask=pair < end, other=0).to(tl.int64)
        mask = (pair < end)[:, None] & (column < H)[None, :]
        terms = tl.load(y + row[:, None] * H + column[None, :], mask=mask, other=0.0)
        total += tl.sum(terms.to(tl.float32), 0)
    tl.store(out + token * H + column, total, mask=column < H)
