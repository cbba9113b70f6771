"""Weights of 1, 2, 3, 4 or 8 bits with a scale for each group of inputs, multiplied without unpacking them.

W ~ q * scale with signed integers q in [-2^(bits-1), 2^(bits-1) - 1]; for one bit q is -1 or 1. Activations
are rounded to 8 bits with a scale for each row and group; their products are summed in integers within a
group, and in float32 over groups. Two forms: the operators of packed.cpp (AVX-512 VNNI, AVX2, NEON, plain
C++, chosen as they run; triton_packed.py), and the reference here with the same rounding.

Shapes: T tokens, N rows or (token, expert) pairs sorted by expert, E experts, P outputs, K inputs, G groups
of a row, B blocks of 16 rows, H hidden, I intermediate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.errors import UserError

from . import native, packed_torch
from .arguments import groups, needs_grad
from .dispatch import choose, triton_form
from .few_rows import MoEOutput
from .swiglu import GATES

BITS = (1, 2, 3, 4, 8)
LANES, CHUNK, STEP = 16, 32, 4
"""Rows of a block, columns of a chunk, columns that one instruction multiplies: see packed.h."""
MOST_GROUP = 512


def check(bits: Sequence[int], group: int, *widths: int) -> None:
    """

    Raises:
        UserError: other bits than ``BITS``, or a group that does not divide one of ``widths``.
    """
    for one in bits:
        if one not in BITS:
            raise UserError(f"packed weights got {one} bits, expected one of {', '.join(map(str, BITS))}")
    for width in widths:
        if not 0 < group <= MOST_GROUP or width % group:
            raise UserError(
                f"the group {group} does not divide the width {width}, expected a divisor of at most "
                f"{MOST_GROUP} (64 or 32 fit most models)"
            )


def planes(bits: int, nested: bool = False) -> tuple[int, ...]:
    """Widths of the planes of a code, the highest first.

    The first planes alone are a coarser code; nested ones can be cut at every number of bits from 2 (codes of
    4 bits) or 4 (of 8) on, as D2MoE does (arXiv 2504.15299), and are slower to unpack.
    """
    if nested and bits in (4, 8):
        return (2, 1, 1) if bits == 4 else (4, 1, 1, 1, 1)
    return (2, 1) if bits == 3 else (bits,)


def quantize_rtn(W_OK: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round to nearest: [..., O, K] to codes [..., O, K] int8 and scales [..., O, G], float32.

    The entry of a group that is largest without its sign becomes -2^(bits-1), so the scale may be negative
    and all codes are used; for one bit the scale is the mean absolute entry. Scales are rounded to float16
    first: that is how they are stored.

    Raises:
        UserError: see :func:`check`.
    """
    check([bits], group, W_OK.shape[-1])
    W = W_OK.detach().float().unflatten(-1, (-1, group))
    if bits == 1:
        scale = W.abs().mean(-1).half().float()
        return torch.where(W < 0, -1, 1).to(torch.int8).flatten(-2), scale
    most = W.gather(-1, W.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scale = (most / -(2 ** (bits - 1))).half().float()
    return codes_of(W_OK, scale, bits), scale


def codes_of(W_OK: Tensor, scale_OG: Tensor, bits: int) -> Tensor:
    """The nearest codes, int8 [..., O, K], for given scales."""
    W, scale = W_OK.detach().float().unflatten(-1, (scale_OG.shape[-1], -1)), scale_OG[..., None]
    q = torch.where(scale == 0, 0, W / scale)
    if bits == 1:
        return torch.where(q < 0, -1, 1).to(torch.int8).flatten(-2)
    return q.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8).flatten(-2)


@dataclass(eq=False)
class Stack:
    """Packed matrices [P, K], one for each of ``bits``. What is in memory is described in packed.h."""

    codes: Tensor
    """uint8, flat: matrix after matrix, in each plane after plane [B, G, chunks, width, 64]."""
    scales: Tensor
    """[E, B, G, 16]: float16, seen as int16 so that no cast of a model touches it."""
    bits: tuple[int, ...]
    rows: int
    width: int
    group: int
    nested: bool = False
    halves: int = 1
    """2 for gate and up rows: their blocks take turns."""

    @classmethod
    def empty(
        cls, bits: Sequence[int], rows: int, width: int, group: int, nested: bool = False, halves: int = 1
    ) -> "Stack":
        """Make a stack on torch's default device; its contents are undefined.

        Raises:
            UserError: see :func:`check`.
        """
        check(bits, group, width)
        blocks, G = halves * -(-rows // halves // LANES), width // group
        columns = G * filled(group)
        codes = torch.empty(sum(bits) * blocks * LANES * columns // 8, dtype=torch.uint8)
        scales = torch.empty(len(bits), blocks, G, LANES, dtype=torch.int16)
        return cls(codes, scales, tuple(bits), rows, width, group, nested, halves)

    @torch.no_grad()
    def fill(self, e: int, q_PK: Tensor, scale_PG: Tensor) -> None:
        """Write matrix ``e``: codes as of :func:`quantize_rtn`, and scales.

        Raises:
            UserError: codes out of range.
        """
        bits, G = self.bits[e], self.width // self.group
        u = (q_PK.to(torch.int16) + 1) // 2 if bits == 1 else q_PK.to(torch.int16) + 2 ** (bits - 1)
        if u.min() < 0 or u.max() >= 2**bits:
            raise UserError(f"codes are out of range for {bits} bits: {q_PK.min()} to {q_PK.max()}")
        u_PK = F.pad(u.to(torch.uint8).unflatten(-1, (G, -1)), (0, filled(self.group) - self.group)).flatten(
            1
        )
        u_BRK = self._blocks(u_PK)
        # [B, R, G, chunk, step, 4] -> [B, G, chunk, step, 64]
        steps = u_BRK.unflatten(-1, (G, -1, CHUNK // STEP, STEP)).permute(0, 2, 3, 4, 1, 5).flatten(-2)
        start, low = self.starts()[e], bits
        for width in planes(bits, self.nested):
            low -= width
            parts = (steps >> low & 2**width - 1).unflatten(3, (width, 8 // width))
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=parts.device)[:, None]
            packed = (parts << shifts).sum(4, dtype=torch.uint8).flatten()
            self.codes[start : start + packed.numel()] = packed
            start += packed.numel()
        halves_BRG = self._blocks(scale_PG.to(torch.float16).view(torch.int16))
        self.scales[e] = halves_BRG.transpose(1, 2)

    def unpack(self, e: int) -> tuple[Tensor, Tensor]:
        """Codes [P, K] int8 and scales [P, G] float32 of matrix ``e``, as :meth:`fill` got them."""
        u_PK, scale_PG, _, step = self.unpacked(e, 0)
        bits = self.bits[e]
        q = u_PK.to(torch.int16) * 2 - 1 if bits == 1 else u_PK.to(torch.int16) - 2 ** (bits - 1)
        return q.to(torch.int8), scale_PG / step

    def dequantize(self, e: int, level: int = 0) -> Tensor:
        """Matrix ``e``, [P, K] float32; of the first ``level`` bits where that is not 0."""
        u_PK, scale_PG, zero, _ = self.unpacked(e, level)
        return ((u_PK.float() - zero).unflatten(-1, (scale_PG.shape[-1], -1)) * scale_PG[..., None]).flatten(
            1
        )

    def take(self, e: int, row_X: Tensor) -> Tensor:
        """Some rows of matrix ``e``, [X, K] float32; ``halves`` is 1."""
        bits, G = self.bits[e], self.width // self.group
        block_X, lane_X = row_X // LANES, row_X % LANES
        start, u = self.starts()[e], None
        for width in planes(bits, self.nested):
            size = self.scales.shape[1] * G * filled(self.group) // CHUNK * width * 64
            plane = self.codes[start : start + size].view(
                -1, G, filled(self.group) // CHUNK, width, LANES, STEP
            )
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)[:, None]
            # [X, G, chunk, width, 1, 4] -> [X, G, chunk, 8 steps, 4]
            picked = plane[block_X, :, :, :, lane_X, None]
            part = (picked >> shifts & 2**width - 1).flatten(3, 4)
            u = part if u is None else u << width | part
            start += size
        assert u is not None
        zero, step = middle(bits, bits)
        u_XGk = u.flatten(2)[..., : self.group].float() - zero
        scale_XG = self.scales[e].view(torch.float16)[block_X, :, lane_X].float() * step
        return (u_XGk * scale_XG[..., None]).flatten(1)

    def unpacked(self, e: int, level: int) -> tuple[Tensor, Tensor, float, float]:
        """Unsigned codes [P, K], steps between their values [P, G], what is subtracted from the codes, and
        how many scales make a step."""
        bits, G, blocks = self.bits[e], self.width // self.group, self.scales.shape[1]
        start, u = self.starts()[e], None
        widths, have = plane_widths(bits, self.nested, level)
        for width in widths:
            size = blocks * G * filled(self.group) // CHUNK * width * 64
            plane = self.codes[start : start + size].view(blocks, G, -1, width, 1, 64)
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)[:, None]
            part = (plane >> shifts & 2**width - 1).flatten(3, 4)
            u = part if u is None else u << width | part
            start += size
        assert u is not None
        # [B, G, chunk, step, 64] -> [B, R, G, chunk, step, 4]
        u_BRK = u.unflatten(-1, (LANES, STEP)).permute(0, 4, 1, 2, 3, 5)
        u_BRK = u_BRK.reshape(blocks, LANES, G, -1)[..., : self.group].flatten(2)
        scale_BRG = self.scales[e].view(torch.float16).float().transpose(1, 2)
        zero, step = middle(bits, have)
        return self._rows(u_BRK), self._rows(scale_BRG) * step, zero, step

    def one(self, e: int) -> "Stack":
        """Matrix ``e`` alone; nothing is copied."""
        if len(self.bits) == 1:
            return self
        start, stop = self.starts()[e : e + 2]
        own = (self.codes[start:stop], self.scales[e : e + 1], self.bits[e : e + 1])
        return Stack(*own, self.rows, self.width, self.group, self.nested, self.halves)

    def starts(self) -> list[int]:
        """Offsets at which the codes of each matrix begin."""
        one = self.scales.shape[1] * LANES * (self.width // self.group) * filled(self.group) // 8
        starts = [0]
        for bits in self.bits:
            starts.append(starts[-1] + bits * one)
        return starts

    def _blocks(self, values_PX: Tensor) -> Tensor:
        """[P, X] -> [B, 16, X], zeros in rows that fill up a block."""
        values = values_PX.unflatten(0, (self.halves, -1))
        values = F.pad(values, (0, 0, 0, -values.shape[1] % LANES)).unflatten(1, (-1, LANES))
        return values.transpose(0, 1).flatten(0, 1)

    def _rows(self, values_BRX: Tensor) -> Tensor:
        """[B, 16, X] -> [P, X]"""
        values = values_BRX.unflatten(0, (-1, self.halves)).transpose(0, 1).flatten(1, 2)
        return values[:, : self.rows // self.halves].flatten(0, 1)


def plane_widths(bits: int, nested: bool, level: int) -> tuple[tuple[int, ...], int]:
    """Widths of the planes that hold the first ``level`` bits, or all for 0, and the bits that they hold."""
    found: list[int] = []
    for width in planes(bits, nested):
        if level == 0 or sum(found) < level:
            found.append(width)
    return tuple(found), sum(found)


def middle(bits: int, level: int) -> tuple[float, float]:
    """(zero, step) such that W ~ (u - zero) * step * scale for the first ``level`` bits u of a code.

    Codes that are cut lie in the middle of those that they stand for.
    """
    if bits == 1:
        return 0.5, 2.0
    lost = 2.0 ** (bits - level)
    return 2.0 ** (level - 1) - (1 - 1 / lost) / 2, lost


def filled(group: int) -> int:
    """Columns of a group with those that fill up its last chunk."""
    return -(-group // CHUNK) * CHUNK


# ---------------------------------------------------------------- products


def quantize_rows(x_NK: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Activations of 8 bits: integers [N, G, group] as float32, and scales [N, G]."""
    x = x_NK.float().unflatten(-1, (-1, group))
    most = x.abs().amax(-1, keepdim=True)
    times = torch.where(most > 1e-30, 127 / most, 0)
    return (x * times).round(), (most / 127).squeeze(-1)


def linear_reference(x_NK: Tensor, stack: Stack, e: int, level: int = 0) -> Tensor:
    """[N, P] in float32: rows of 8 bits times matrix ``e``."""
    q_NGk, x_scale_NG = quantize_rows(x_NK, stack.group)
    u_PK, scale_PG, zero, _ = stack.unpacked(e, level)
    u_PGk = u_PK.float().unflatten(-1, (-1, stack.group)) - zero
    # sums of up to 512 products of 8 bits are exact in float32
    sums_NPG = torch.einsum("ngk,pgk->npg", q_NGk, u_PGk)
    return (sums_NPG * x_scale_NG[:, None] * scale_PG).sum(-1)


def linear(x: Tensor, stack: Stack, bias: Tensor | None = None, level: int = 0, e: int = 0) -> Tensor:
    """x [..., K] times matrix ``e`` of a stack, plus ``bias`` [P]: [..., P] in x's dtype.

    Gradients reach x, and are those of the product without rounded activations.
    """
    if runs_native(x, *(() if bias is None else (bias,))):
        own = stack.one(e)
        scale = (own.scales, own.rows, own.bits[0], own.nested, level)
        bias = None if bias is None else bias.float()
        y = torch.ops.unimoe.packed_linear.default(x.float(), own.codes, *scale, bias)
        return y if x.dtype is torch.float32 else y.to(x.dtype)
    if runs_triton(x):
        return triton_form("packed_linear")(x, stack.one(e), bias, level)
    # of the whole stack: what torch multiplies is kept by its codes, and those of one(e) are gone at once
    y = _product(x.reshape(-1, stack.width), stack, e, level).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def fused_experts(
    x_TH: Tensor,
    token_N: Tensor,
    offsets_E1: Tensor,
    weight_N: Tensor,
    gate_up: Stack,
    down: Stack,
    bits_E: Tensor,
    act: str = "silu",
    level: int = 0,
) -> Tensor:
    """``fused_experts`` of swiglu.py with packed weights: [T, H] sums over the pairs of each token.

    Args:
        x_TH: the tokens.
        token_N: [N] int64, token of each pair, sorted by expert.
        offsets_E1: [E+1] int64: expert e owns pairs offsets[e]..offsets[e+1].
        weight_N: [N] factor of each pair's output.
        gate_up: of E matrices [2I, H], gate rows first, ``halves`` 2.
        down: of E matrices [H, I].
        bits_E: [E] uint8 on the CPU, the bits of both stacks.
        act: of the gate, a name of ``GATES``.
        level: bits of each code that count, 0 for all.
    """
    if runs_native(x_TH, weight_N):
        pairs = (token_N, offsets_E1.tolist(), weight_N.float())
        run = torch.ops.unimoe.packed_experts.default
        weights = _operands(gate_up, down, bits_E)
        return run(x_TH.float(), *pairs, *weights, level, list(GATES).index(act)).to(x_TH.dtype)
    if runs_triton(x_TH, weight_N):
        pairs = (x_TH, token_N, offsets_E1, weight_N)
        return triton_form("packed_experts")(*pairs, gate_up, down, act, level)
    y_TH = torch.zeros_like(x_TH)
    for e, start, end in groups(offsets_E1.tolist()):
        token, weight_n1 = token_N[start:end], weight_N[start:end, None]
        gate, up = _product(x_TH[token], gate_up, e, level).chunk(2, -1)
        y = _product(GATES[act](gate) * up, down, e, level) * weight_n1.to(x_TH.dtype)
        y_TH = y_TH.index_add(0, token, y)
    return y_TH


def _product(x_NK: Tensor, stack: Stack, e: int, level: int) -> Tensor:
    """Rows times matrix ``e`` without the operators: in torch's own packed product, or unpacked."""
    if not needs_grad(x_NK) and packed_torch.fits(x_NK, stack.group):
        return packed_torch.product(x_NK, stack.codes, (e, level), lambda: stack.unpacked(e, level)[:3])
    return F.linear(x_NK, stack.dequantize(e, level).to(x_NK.dtype))


def moe(
    x_TH: Tensor,
    router_EH: Tensor,
    k: int,
    gate_up: Stack,
    down: Stack,
    bits_E: Tensor,
    act: str,
    *,
    late: bool,
    renormalize: bool,
    scale: float = 1.0,
) -> MoEOutput:
    """A whole MoE layer in one operator: :func:`unimoe.kernels.few_rows.moe` with packed experts."""
    run = torch.ops.unimoe.packed_moe.default
    weights = _operands(gate_up, down, bits_E)
    return MoEOutput(*run(x_TH, router_EH, k, late, renormalize, scale, *weights, list(GATES).index(act)))


def _operands(gate_up: Stack, down: Stack, bits_E: Tensor) -> tuple[Any, ...]:
    """The experts' weights as the operators take them."""
    return [gate_up.codes, gate_up.scales], [down.codes, down.scales], bits_E, down.width, down.nested


def runs_native(x: Tensor, *others: Tensor) -> bool:
    """Whether the operators of packed.cpp multiply ``x``: they are built, it is on the CPU, and no gradient
    of it or ``others`` and no compiled graph is asked for."""
    return (
        x.device.type == "cpu"
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in (x, *others)))
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and native.ops() is not None
    )


def runs_triton(x: Tensor, *others: Tensor) -> bool:
    """Whether the Triton form multiplies ``x``: no gradient of it or ``others`` is asked for, and Triton runs
    here."""
    return not needs_grad(x, *others) and x.numel() > 0 and choose("packed_linear", x) == "triton"
