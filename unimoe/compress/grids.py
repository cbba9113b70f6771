"""Grids of 1, 2, 3, 4 or 8 bits with one scale per group of a row.

A weight is stood for by ``code * scale``. Codes of b >= 2 bits are integers from -2^(b-1) to 2^(b-1) - 1; one
bit is the sign, -1 or +1. Codes themselves, and how they are stored: :mod:`unimoe.kernels.packed`.

Shapes: O outputs, K inputs, G groups of a row.
"""

import torch
from torch import Tensor

from unimoe.kernels.packed import codes_of, quantize_rtn


def dequantize(codes_OK: Tensor, scale_OG: Tensor) -> Tensor:
    """[O, K] weights in float32 that the codes stand for."""
    groups = codes_OK.unflatten(-1, (scale_OG.shape[-1], -1))
    return (groups * scale_OG[..., None]).flatten(-2)


def rounded(w_OK: Tensor, bits: int, group: int) -> Tensor:
    """The weights after rounding to nearest, in their own type."""
    return dequantize(*quantize_rtn(w_OK.float(), bits, group)).to(w_OK.dtype)


def fitted_scale(w: Tensor, bits: int, steps: int = 12) -> Tensor:
    """[..., 1] the scale of each last dimension with the least squared error of rounding, as it is stored, in
    float16.

    Tried are the scale of :func:`quantize_rtn` and ``steps`` shares, from 1 down to 0.45, of the one that
    spans the largest magnitude with the shorter end of the range; each with both signs. With one bit the mean
    magnitude is the optimum.
    """
    if bits == 1:
        return w.abs().mean(-1, keepdim=True).half().float()
    longer, shorter = 1 << (bits - 1), (1 << (bits - 1)) - 1
    shares = [1 / longer, *(torch.linspace(1, 0.45, steps) / shorter).tolist()]
    most = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(most), torch.full_like(most, torch.inf)
    for share in shares:
        for sign in (-1, 1):
            scale = (most * (sign * share)).half().float()
            error = (codes_of(w, scale, bits) * scale - w).square_().sum(-1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    return best
