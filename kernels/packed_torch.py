"""Packed weights in torch's own int4 product, for CPUs where packed.cpp is not built.

Codes of up to 4 bits are one product, of 8 bits two. It is fast in bfloat16 only (in float32 several times
slower than a plain product), so activations and scales are rounded to that. Weights are converted once and
kept as long as the packed ones are, which doubles their memory.

Shapes: N rows, P outputs, K inputs, G groups of a row.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

GROUPS = (32, 64, 128, 256)
MOST_ROWS = 16
"""Most rows of these products: with more, unpacking and a plain product are faster."""
Parts = list[tuple[Tensor, Tensor]]
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Codes of a stack -> (matrix, level) -> what torch multiplies."""


def fits(x_NK: Tensor, group: int) -> bool:
    """Whether torch's product multiplies these rows."""
    return (
        x_NK.device.type == "cpu"
        and 0 < x_NK.shape[0] <= MOST_ROWS
        and group in GROUPS
        and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        and not torch.compiler.is_compiling()
    )


def product(
    x_NK: Tensor, codes: Tensor, matrix: tuple[int, int], unpack: Callable[[], tuple[Tensor, Tensor, float]]
) -> Tensor:
    """[N, P] in x's dtype: rows times a packed matrix.

    Args:
        x_NK: the rows.
        codes: of the stack that holds the matrix.
        matrix: its number, and how many bits of it count.
        unpack: returns unsigned codes [P, K], steps between their values [P, G], and what is subtracted from
            the codes; called once.
    """
    kept = cast("dict[tuple[int, int], tuple[int, int, Parts]]", _kept.setdefault(codes, {}))
    if matrix not in kept:
        kept[matrix] = _convert(*unpack())
    x, (rows, group, parts) = x_NK.bfloat16(), kept[matrix]
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    y_NP = torch.stack([multiply(x, weight, group, scale).float() for weight, scale in parts]).sum(0)
    return y_NP[:, :rows].to(x_NK.dtype)


def _convert(u_PK: Tensor, scale_PG: Tensor, zero: float) -> tuple[int, int, Parts]:
    """P, the group, and torch's weights: W is (u - 8) * scale + offset, u of 4 bits; rows are filled up to
    16."""
    if u_PK.max() < 16:
        up = round(8 - zero)  # to the middle of torch's codes, for a small offset: bfloat16 rounds the sum
        parts = [(u_PK + up, scale_PG, 8 - zero - up)]
    else:
        parts = [(u_PK >> 4, scale_PG * 16, (128 - zero) / 16), (u_PK & 15, scale_PG, 8.0)]
    found, more = [], (0, 0, 0, -u_PK.shape[0] % 16)
    for u, scale, offset in parts:
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(u, more).int(), 1)
        both_GP2 = torch.stack([F.pad(scale, more).t(), F.pad(scale * offset, more).t()], dim=-1)
        found.append((weight, both_GP2.bfloat16().contiguous()))
    return u_PK.shape[0], u_PK.shape[1] // scale_PG.shape[1], found
