"""SwiGLU experts with a low-rank adapter per expert: W_e = W + scale * B_e A_e, never materialised.

Shapes: T tokens, N (token, expert) pairs sorted by expert, n rows of one expert, E experts, R rank, H hidden,
I intermediate. Adapters: A_gate_up [E, R, H], B_gate_up [E, 2I, R], A_down [E, R, I], B_down [E, H, R].

The triton form is in triton_lora.py. The cpu form is that of swiglu.py, one autograd.Function. It saves the
input and the pre-activations, recomputes the rest, and does no work for what is frozen: with frozen bases,
backward is the input gradient and the narrow adapter products.
"""

from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .arguments import gather_and_sum, one_by_one, prepare, without_autocast
from .dispatch import triton_form
from .swiglu import GATES, Weights, check_gate, grouped_swiglu


class Adapters(NamedTuple):
    """The stacked adapters of all experts, shapes as above."""

    A_gate_up: Tensor
    B_gate_up: Tensor
    A_down: Tensor
    B_down: Tensor


def fused_lora_experts(
    x: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    adapters: Adapters,
    scale: float,
    weight_N: Tensor | None = None,
    token_N: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """:func:`~unimoe.kernels.swiglu.fused_experts` with the adapted weights: same arguments, same result."""
    check_gate(act)
    stacks = (gate_up_proj, down_proj, *adapters)
    form, x, stacks, weight_N = prepare("fused_lora_experts", x, stacks, weight_N)
    with without_autocast(x):
        gate_up, down, *lora = stacks
        own = Adapters(*lora)
        if form == "reference":
            run = partial(lora_experts_reference, adapters=own, scale=scale, weight_N=weight_N, act=act)
            return gather_and_sum(run, x, token_N, offsets_E1, gate_up, down)
        if form == "triton":
            run = triton_form("fused_lora_experts")
            return run(x, offsets_E1, gate_up, down, own, scale, weight_N, token_N, act)
        return grouped_swiglu(x, token_N, offsets_E1, Weights(*stacks), weight_N, scale, act)


def lora_experts_reference(
    x_ND: Tensor,
    offsets_E1: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    adapters: Adapters,
    scale: float,
    weight_N: Tensor | None = None,
    act: str = "silu",
) -> Tensor:
    """``fused_lora_experts`` on rows, one expert after the other in plain autograd."""

    def expert(x: Tensor, weight: Tensor | None, gate_up: Tensor, down: Tensor, *lora: Tensor) -> Tensor:
        A1, B1, A2, B2 = lora
        gate, up = (F.linear(x, gate_up) + scale * F.linear(F.linear(x, A1), B1)).chunk(2, dim=-1)
        activation = GATES[act](gate) * up
        if weight is not None:
            activation = activation * weight
        return F.linear(activation, down) + scale * F.linear(F.linear(activation, A2), B2)

    return one_by_one(expert, x_ND, offsets_E1, (gate_up_proj, down_proj, *adapters), weight_N)
