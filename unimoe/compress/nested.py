"""Nested planes: one weight at several numbers of bits, each a part of the next (D2MoE, arXiv 2504.15299).

The base is an ordinary code with zero points. Every plane behind it adds one bit: the sign of what is still
missing, times a scale per group. A reader of few bits loads the base, one of more bits the next planes as
well.

Shapes: O outputs, K inputs, G groups of a row, P planes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .gptq import inverse_factor


@dataclass
class Nested:
    """A matrix [O, K] at ``base`` to ``base + P`` bits."""

    base: int
    codes_OK: Tensor
    """uint8, 0 to 2^base - 1."""
    scale_OG: Tensor
    zero_OG: Tensor
    """Code that stands for 0; not an integer in general."""
    sign_POK: Tensor
    """bool: whether a plane adds its scale or subtracts it."""
    scale_POG: Tensor

    def at(self, bits: int) -> Tensor:
        """[O, K] weights in float32 from the first ``bits`` bits."""
        groups = self.scale_OG.shape[1]
        codes = self.codes_OK.float().unflatten(1, (groups, -1))
        w = (codes - self.zero_OG[..., None]) * self.scale_OG[..., None]
        for plane in range(bits - self.base):
            sign = self.sign_POK[plane].unflatten(1, (groups, -1)).float() * 2 - 1
            w = w + sign * self.scale_POG[plane][..., None]
        return w.flatten(1)

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """Stored bits of a weight with all planes, scales and zero points included."""
        planes, group = len(self.sign_POK), self.codes_OK.shape[1] / self.scale_OG.shape[1]
        return self.base + planes + scale_bits * (2 + planes) / group


def nest(
    w_OK: Tensor,
    base: int,
    top: int,
    group: int,
    hessian_KK: Tensor | None = None,
    damping: float = 0.01,
) -> Nested:
    """Quantize ``w_OK`` to ``base`` bits, and to every further bit up to ``top`` (eq. 2 to 5).

    With a Hessian (sum of x x^T over calibration rows) the error that a group makes at ``top`` bits is
    carried into the groups after it (algorithm 1: compensation by blocks, none by columns). Without one,
    scales are the closed
    form: the mean absolute value of what is missing.
    """
    w_OK = w_OK.detach().float().clone()
    outputs, inputs = w_OK.shape
    factor_KK = None if hessian_KK is None else inverse_factor(hessian_KK, damping)
    parts = []
    for start in range(0, inputs, group):
        stop = start + group
        part = _nest_group(w_OK[:, start:stop], base, top)
        parts.append(part)
        if factor_KK is not None:
            missing = w_OK[:, start:stop] - part.at(top)
            own = factor_KK[start:stop, start:stop]
            error = torch.linalg.solve_triangular(own, missing, upper=True, left=False)
            w_OK[:, stop:] -= error @ factor_KK[start:stop, stop:]
    return Nested(
        base,
        torch.cat([part.codes_OK for part in parts], 1),
        torch.cat([part.scale_OG for part in parts], 1),
        torch.cat([part.zero_OG for part in parts], 1),
        torch.cat([part.sign_POK for part in parts], 2),
        torch.cat([part.scale_POG for part in parts], 2),
    )


def _nest_group(w_OK: Tensor, base: int, top: int) -> Nested:
    """One group of inputs."""
    least, most = w_OK.amin(1, keepdim=True), w_OK.amax(1, keepdim=True)
    levels = (1 << base) - 1
    scale = ((most - least) / levels).clamp_min_(1e-12)
    zero = -least / scale
    codes = (w_OK / scale + zero).round_().clamp_(0, levels)
    missing = w_OK - (codes - zero) * scale
    signs, scales = [], []
    for _ in range(top - base):
        sign, size = missing >= 0, missing.abs().mean(1, keepdim=True)
        missing = missing - torch.where(sign, size, -size)
        signs.append(sign)
        scales.append(size)
    shape = (0, *w_OK.shape)
    sign_POK = torch.stack(signs) if signs else torch.zeros(shape, dtype=torch.bool)
    scale_POG = torch.stack(scales) if scales else torch.zeros(0, len(w_OK), 1)
    return Nested(base, codes.to(torch.uint8), scale, zero, sign_POK, scale_POG)
