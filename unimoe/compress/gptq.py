"""GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1) of one matrix.

Shapes: O outputs, K inputs, G groups of a row, B inputs that are rounded before the others are corrected.
"""

import torch
from torch import Tensor

from unimoe.kernels.packed import codes_of

from .grids import fitted_scale


def gptq(
    w_OK: Tensor, hessian_KK: Tensor, bits: int, group: int, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Codes [O, K] int8 and scales [O, G] float32 that keep ``w_OK @ x`` for the inputs of the Hessian.

    The inputs are rounded one after another, those with the largest values first; each one's error is
    carried into those that follow, by the inverse of the Hessian. Groups are of neighbours, with the scales
    that fit the weights as they were (the authors' ``act_order`` and ``static_groups``).

    Args:
        w_OK: the matrix.
        hessian_KK: sum of x x^T over calibration rows; its scale does not matter.
        bits: 1, 2, 3, 4 or 8.
        group: inputs that share a scale; divides K.
        damping: share of the Hessian's mean diagonal that is added to its diagonal; ten times more as long as
            the Hessian cannot be inverted. Inputs that were never seen are rounded to nearest.
    """
    order_K = hessian_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK = inverse_factor(hessian_KK[order_K][:, order_K], damping)
    w_OK = w_OK.detach().float()
    scale_OG = fitted_scale(w_OK.unflatten(1, (-1, group)), bits).squeeze(-1)
    scale_KO = scale_OG.t()[order_K // group]
    w_KO = w_OK.t()[order_K]  # rounded and corrected in place, an input at a time
    codes_KO = torch.empty_like(w_KO)
    for start in range(0, len(w_KO), group):
        stop = start + group
        part_BO, factor_BB = w_KO[start:stop], factor_KK[start:stop, start:stop]
        error_BO = torch.empty_like(part_BO)
        for i, scale_O in enumerate(scale_KO[start:stop]):
            codes_KO[start + i] = codes_of(part_BO[i, :, None], scale_O[:, None], bits)[:, 0]
            error_BO[i] = (part_BO[i] - codes_KO[start + i] * scale_O) / factor_BB[i, i]
            part_BO[i + 1 :].addr_(factor_BB[i, i + 1 :], error_BO[i], alpha=-1)
        w_KO[stop:].addmm_(factor_KK[start:stop, stop:].t(), error_BO, alpha=-1)
    codes_OK = torch.empty_like(w_OK, dtype=torch.int8)
    codes_OK[:, order_K] = codes_KO.t().to(torch.int8)
    return codes_OK, scale_OG


def inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse, H^-1 = U^T U.

    Raises:
        ValueError: the Hessian holds NaN or infinities.
    """
    if not hessian_KK.isfinite().all():
        raise ValueError("the Hessian is not finite")
    diagonal = hessian_KK.diagonal()
    mean = diagonal.mean().item() or 1.0
    dead = diagonal == 0
    while True:
        damped = hessian_KK.float() + torch.diag(torch.where(dead, mean, damping * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping = max(10 * damping, 1e-6)
