"""Many low-rank experts on one projection, of which each token visits few (:class:`~unimoe.moe.LoRALinear`).

As one wide adapter, the product of every token with every expert is computed, and most of it is multiplied
by zero. The operator in native.cpp computes the products of the pairs instead.

Shapes: T tokens, D inputs and P outputs of the projection, E experts of rank r, N (token, expert) pairs
sorted by expert. Banks hold some experts each: A [experts * r, D], B [P, experts * r].
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .dispatch import choose


def runs_on(*tensors: Tensor) -> bool:
    """Whether the operator is built and can run on these: all are float32 and on the CPU, no graph is being
    compiled, and UNIMOE_KERNELS does not ask for the reference."""
    return (
        all(one.dtype is torch.float32 and one.device.type == "cpu" for one in tensors)
        and not torch.compiler.is_compiling()
        and native.ops() is not None
        and choose("low_rank_experts", tensors[0]) != "reference"
    )


def low_rank_experts(
    y_TP: Tensor,
    x_TD: Tensor,
    banks: Sequence[tuple[Tensor, Tensor]],
    rank: int,
    token_N: Tensor,
    expert_N: Tensor,
    offsets_E1: Tensor,
    weight_N: Tensor,
) -> Tensor:
    """y + sum over the pairs of each token of w B_e A_e x, differentiable; frozen banks get no gradient.

    Args:
        y_TP: output of the projection itself.
        x_TD: its input.
        banks: A and B of each, experts of ``rank`` in order.
        rank: r.
        token_N, expert_N, offsets_E1, weight_N: the pairs, as of :class:`~unimoe.moe.Routing`.
    """
    parameters = [parameter for bank in banks for parameter in bank]
    return _LowRank.apply(y_TP, x_TD, weight_N, token_N, expert_N, offsets_E1.tolist(), rank, *parameters)


class _LowRank(torch.autograd.Function):
    """Backward is the same operator with A and B exchanged: v = B_e^T dy for each pair, dx += w A_e^T v."""

    @staticmethod
    def forward(
        ctx: Any,
        y_TP: Tensor,
        x_TD: Tensor,
        weight_N: Tensor,
        token_N: Tensor,
        expert_N: Tensor,
        bounds: list[int],
        rank: int,
        *parameters: Tensor,
    ) -> Tensor:
        banks = [*parameters[::2], *(B_PR.T.contiguous() for B_PR in parameters[1::2])]  # A, then B in rows
        y_TP = y_TP.clone(memory_format=torch.contiguous_format)
        run = torch.ops.unimoe.low_rank_experts.default
        count = len(parameters) // 2
        u_Nr = run(x_TD, token_N, bounds, weight_N, banks[:count], banks[count:], rank, y_TP)
        ctx.save_for_backward(x_TD, weight_N, token_N, expert_N, u_Nr, *banks)
        ctx.bounds, ctx.rank, ctx.rows = bounds, rank, [len(A) for A in parameters[::2]]
        return y_TP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TP: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_TD, weight_N, token_N, expert_N, u_Nr, *banks = ctx.saved_tensors
        count = len(banks) // 2
        dx_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[1] else None
        run = torch.ops.unimoe.low_rank_experts.default
        v_Nr = run(dy_TP, token_N, ctx.bounds, weight_N, banks[count:], banks[:count], ctx.rank, dx_TD)
        grads: list[Tensor | None] = []
        starts = accumulate(ctx.rows, initial=0)
        for i, (start, rows) in enumerate(zip(starts, ctx.rows, strict=False)):
            first = start // ctx.rank
            own = slice(ctx.bounds[first], ctx.bounds[first + rows // ctx.rank])
            at = token_N[own], expert_N[own] - first

            def wide(value_Nr: Tensor) -> Tensor:
                """[T, rows of the bank], zero where a token does not visit an expert."""
                zeros = x_TD.new_zeros(len(x_TD), rows // ctx.rank, ctx.rank)  # noqa: B023
                zeros[at] = weight_N[own, None] * value_Nr[own]  # noqa: B023
                return zeros.flatten(1)

            # a bank that no token visits has no gradient, so that no optimizer moves it
            visited = own.start < own.stop
            needs_A, needs_B = (need and visited for need in ctx.needs_input_grad[7 + 2 * i : 9 + 2 * i])
            grads += [wide(v_Nr).T @ x_TD if needs_A else None, dy_TP.T @ wide(u_Nr) if needs_B else None]
        dweight_N = (u_Nr * v_Nr).sum(-1) if ctx.needs_input_grad[2] else None
        return dy_TP, dx_TD, dweight_N, None, None, None, None, *grads
