"""A linear layer with banks of low-rank experts: y = x W^T + b + scale * sum over experts of w_e B_e A_e x.

Shapes: T tokens, D inputs, P outputs, E experts of a bank, r rank of an expert, R = E * r, n tokens of one
expert.

A mixture inside the projection (LoRAMoE, arXiv 2312.09979; MoLoRA, arXiv 2309.05444; DyMoE's growing banks).
With the weights between A and B all experts of a bank are one adapter of width R: two wide products instead
of 2E narrow ones, at the price of those experts that a token does not visit. While R is small next to D and P
that price is less than what it costs to gather the visitors of each expert; beyond, each expert runs on its
own. Banks stay separate tensors: adding one copies nothing, and a frozen one gets no gradient work.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .arguments import needs_grad, without_autocast
from .dispatch import choose, compute_dtype

FOLD = 0.2
"""Widest bank that is folded: extra work R * (1/D + 1/P) as a share of the frozen product's. Measured: at
0.17 folding is ahead, at 0.68 far behind."""


class Bank(NamedTuple):
    """E experts of rank r."""

    A_RD: Tensor
    """[E r, D]; expert e owns rows e*r .. (e+1)*r."""
    B_PR: Tensor
    """[P, E r]; expert e owns the same columns."""
    weight_TE: Tensor | None
    """[T, E] weight of each expert for each token, [1, E] for all tokens, None for 1. Where it is 0 the token
    does not visit the expert, and the weight gets no gradient."""


def adapted_linear(
    x: Tensor, weight_PD: Tensor, bias_P: Tensor | None, banks: Sequence[Bank], scale: float
) -> Tensor:
    """The layer with all its banks.

    Args:
        x: [..., D]; the rows of each ``weight_TE`` are its leading dimensions, flattened.
        weight_PD, bias_P: the base, in x's dtype.
        banks: any number, each of its own width; their parameters may be wider than x (float32 beside a
            half-precision base), and are multiplied in their own dtype, or in autocast's.
        scale: alpha / r.

    Returns:
        [..., P] in x's dtype (autocast's dtype under autocast).
    """
    dtype, form = compute_dtype(x), choose("adapted_linear", x)
    cast = dtype if torch.is_autocast_enabled(x.device.type) else None
    with without_autocast(x):
        x_TD, weight_PD = x.reshape(-1, x.shape[-1]).to(dtype), weight_PD.to(dtype)
        bias_P = None if bias_P is None else bias_P.to(dtype)
        banks = [_cast(bank, cast or bank.A_RD.dtype) for bank in banks]
        if form == "reference":
            y_TP = adapted_linear_reference(x_TD, weight_PD, bias_P, banks, scale)
        else:
            flat = [one for bank in banks for one in bank]
            keep = needs_grad(x_TD, weight_PD, bias_P, *flat)
            y_TP = _Adapted.apply(x_TD, weight_PD, bias_P, scale, keep, *flat)
    return y_TP.reshape(*x.shape[:-1], y_TP.shape[-1])


def adapted_linear_reference(
    x_TD: Tensor, weight_PD: Tensor, bias_P: Tensor | None, banks: Sequence[Bank], scale: float
) -> Tensor:
    """The same as ``adapted_linear``, every expert on every token in plain autograd."""
    y_TP = F.linear(x_TD, weight_PD, bias_P)
    for A_RD, B_PR, weight_TE in banks:
        z_TR = F.linear(x_TD.to(A_RD.dtype), A_RD)
        if weight_TE is not None:
            weight_TE = weight_TE.where(weight_TE != 0, 0)
            z_TR = z_TR * weight_TE.repeat_interleave(A_RD.shape[0] // weight_TE.shape[1], dim=1)
        y_TP = y_TP + (scale * F.linear(z_TR, B_PR)).to(y_TP.dtype)
    return y_TP


def folds(bank: Bank, tokens: int) -> bool:
    """Whether the bank runs as one wide adapter rather than expert by expert."""
    R, outputs = bank.A_RD.shape[0], bank.B_PR.shape[0]
    if bank.weight_TE is None or bank.weight_TE.shape[0] != tokens or bank.weight_TE.device.type != "cpu":
        return True
    if R * (1 / bank.A_RD.shape[1] + 1 / outputs) <= FOLD:
        return True
    return 4 * int(bank.weight_TE.count_nonzero()) > bank.weight_TE.numel()


class _Adapted(torch.autograd.Function):
    """Saved for backward: x, the products with A of folded banks [T, R], and parameters by reference."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_PD: Tensor, bias_P: Tensor | None, scale: float, keep: bool, *flat: Any
    ) -> Tensor:
        y_TP = F.linear(x_TD, weight_PD, bias_P)
        z = []
        for bank in _banks(flat):
            x, y = x_TD.to(bank.A_RD.dtype), y_TP.to(bank.A_RD.dtype)
            if folds(bank, len(x)):
                z_TR = torch.mm(x, bank.A_RD.t())
                y.addmm_(_weigh(z_TR, bank.weight_TE), bank.B_PR.t(), alpha=scale)
                z.append(z_TR)
            else:
                z.append(None)
                for token_n, weight_n, e in _visits(bank):
                    z_nr = torch.mm(x.index_select(0, token_n), bank.A_RD[e].t()).mul_(weight_n)
                    y.index_add_(0, token_n, torch.mm(z_nr, bank.B_PR[:, e].t()), alpha=scale)
            y_TP = y.to(y_TP.dtype)
        if keep:
            ctx.scale = scale
            ctx.save_for_backward(x_TD, weight_PD, *z, *flat)
        return y_TP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TP: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_PD, *rest = ctx.saved_tensors
        z, banks = rest[: len(rest) // 4], _banks(rest[len(rest) // 4 :])
        need_x, need_weight, need_bias, _, _, *needs = ctx.needs_input_grad
        dx_TD = torch.mm(dy_TP, weight_PD) if need_x else None
        grads: list[Tensor | None] = []
        for i, (bank, z_TR) in enumerate(zip(banks, z, strict=True)):
            need = needs[3 * i : 3 * i + 3]
            x, dy = x_TD.to(bank.A_RD.dtype), dy_TP.to(bank.A_RD.dtype)
            if not need_x and not any(need):
                grads += [None, None, None]
                continue
            dx = None if dx_TD is None else dx_TD.to(bank.A_RD.dtype)
            grads += (_one_by_one if z_TR is None else _folded)(bank, z_TR, x, dy, dx, need, ctx.scale)
            dx_TD = None if dx is None else dx.to(x_TD.dtype)
        d_weight = torch.mm(dy_TP.t(), x_TD) if need_weight else None
        return dx_TD, d_weight, dy_TP.sum(0) if need_bias else None, None, None, *grads


def _folded(
    bank: Bank, z_TR: Any, x: Tensor, dy: Tensor, dx: Tensor | None, need: Sequence[bool], scale: float
) -> list[Tensor | None]:
    """Gradients of a folded bank; the input's is added to ``dx``."""
    A_RD, B_PR, weight_TE = bank
    dB = torch.mm(dy.t(), _weigh(z_TR, weight_TE).mul(scale)) if need[1] else None
    if dx is None and not need[0] and not need[2]:
        return [None, dB, None]
    dz_TR = torch.mm(dy, B_PR).mul_(scale)
    d_weight = None
    if need[2] and weight_TE is not None:
        d_weight = (dz_TR * z_TR).unflatten(1, (weight_TE.shape[1], -1)).sum(-1)
        d_weight = d_weight.sum_to_size(weight_TE.shape) * (weight_TE != 0)
    dz_TR = _weigh(dz_TR, weight_TE)
    if dx is not None:
        dx.addmm_(dz_TR, A_RD)
    return [torch.mm(dz_TR.t(), x) if need[0] else None, dB, d_weight]


def _one_by_one(
    bank: Bank, _: None, x: Tensor, dy: Tensor, dx: Tensor | None, need: Sequence[bool], scale: float
) -> list[Tensor | None]:
    """Gradients of a bank whose experts ran on their visitors; the input's is added to ``dx``."""
    dA, dB, d_weight = (
        torch.zeros_like(one) if wanted and one is not None else None
        for one, wanted in zip(bank, need, strict=True)
    )
    for token_n, weight_n, e in _visits(bank):
        x_n, dy_n = x.index_select(0, token_n), dy.index_select(0, token_n)
        z_nr = torch.mm(x_n, bank.A_RD[e].t())
        dz_nr = torch.mm(dy_n, bank.B_PR[:, e]).mul_(scale)
        if d_weight is not None:
            d_weight[token_n, e.start // z_nr.shape[1]] = (dz_nr * z_nr).sum(1)
        if dB is not None:
            dB[:, e] = torch.mm(dy_n.t(), z_nr.mul_(weight_n).mul_(scale))
        dz_nr.mul_(weight_n)
        if dA is not None:
            dA[e] = torch.mm(dz_nr.t(), x_n)
        if dx is not None:
            dx.index_add_(0, token_n, torch.mm(dz_nr, bank.A_RD[e]))
    return [dA, dB, d_weight]


def _cast(bank: Bank, dtype: torch.dtype) -> Bank:
    weight_TE = None if bank.weight_TE is None else bank.weight_TE.to(dtype)
    return Bank(bank.A_RD.to(dtype), bank.B_PR.to(dtype), weight_TE)


def _banks(flat: Sequence[Any]) -> list[Bank]:
    return [Bank(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


def _weigh(z_TR: Tensor, weight_TE: Tensor | None) -> Tensor:
    """Each expert's r columns times its weights."""
    if weight_TE is None:
        return z_TR
    return (z_TR.unflatten(1, (weight_TE.shape[1], -1)) * weight_TE[:, :, None]).flatten(1)


def _visits(bank: Bank) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """For each expert with visitors: their tokens [n], their weights [n, 1], and the expert's slice of R."""
    assert bank.weight_TE is not None
    weight_ET = bank.weight_TE.t()
    rank = bank.A_RD.shape[0] // len(weight_ET)
    expert_N, token_N = weight_ET.nonzero(as_tuple=True)
    sizes = torch.bincount(expert_N, minlength=len(weight_ET)).tolist()
    for e, token_n in enumerate(token_N.split(sizes)):
        if len(token_n):
            yield token_n, weight_ET[e, token_n, None], slice(e * rank, (e + 1) * rank)
