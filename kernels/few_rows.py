"""Products of few rows, as in decoding: one token of each conversation at a time, without a backward pass.

Their time goes into reading the weights. The operators in native.cpp and attention.cpp read each weight once
and do nothing else; torch's float32 products prepare their operands first, which does not pay with few rows.
The operators run only where they are built, and only inside :func:`unimoe.moe.few_rows.few_rows`.

Shapes: T tokens, N (token, expert) pairs sorted by expert, E experts, K of a token, H hidden, I intermediate,
P outputs.
"""

import logging
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import native

MOST_ROWS = 16
"""Most rows of the operators: with more, torch's products are as fast."""
_logger = logging.getLogger(__name__)


class MoEOutput(NamedTuple):
    """What :func:`moe` returns: the output, and what a Routing is made of."""

    y_TH: Tensor
    logits_TE: Tensor
    index_TK: Tensor
    """[T, K] int64, the best expert first."""
    weight_TK: Tensor


def available() -> bool:
    """Whether the operators are built; the answer is logged once."""
    built = native.ops() is not None
    _log(built)
    return built


@cache
def _log(built: bool) -> None:
    processor = torch.backends.cpu.get_cpu_capability()
    _logger.info("products of few rows run in %s", f"C++ ({processor})" if built else "torch")


def few(x: Tensor, *weights: Tensor) -> bool:
    """Whether ``x`` [..., H] has few rows, and the operators can multiply it with these weights: all are
    float32 and on the CPU, and no gradient, autocast or compiled graph is asked for."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if not (x.dtype is torch.float32 and x.is_cpu and 0 < x.numel() <= MOST_ROWS * x.shape[-1]):
        return False
    for one in weights:  # noqa: SIM110  (a generator costs more, hundreds of times for a token)
        if not (one.dtype is torch.float32 and one.is_cpu and one.is_contiguous()):
            return False
    return True


class FewRowsLinear(nn.Linear):
    """A Linear layer whose products of few rows are ours; all others, and everything else, are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        # the operator trusts the widths, torch says what is wrong with them
        if input.shape[-1] != self.in_features or not few(input, weight):
            return super().forward(input)
        return torch.ops.unimoe.few_rows_linear.default(input, [weight], self.bias)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Rows [..., H] over the root of their mean square, times ``weight_H``."""
    return torch.ops.unimoe.few_rows_rms_norm.default(x, weight_H, eps)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """LLaMA's attention of one new token of each of B conversations, between its four linear layers.

    Args:
        q: [B, 1, heads * d].
        k: [B, 1, G * d]; G heads of keys and values.
        v: [B, 1, G * d].
        cos: [B or 1, 1, d], of the tokens' rotary positions.
        sin: as ``cos``.
        keys: [B, G, room, d]; the new ones are written behind the first ``length``.
        values: as ``keys``.
        length: positions that the cache holds.
        mask: [B, 1, 1, length + 1] bool, False where a position is padding; None where none is.
        scale: factor of the products of queries and keys.

    Returns:
        [B, 1, heads * d].
    """
    run = torch.ops.unimoe.few_rows_attention.default
    return run(q, k, v, cos, sin, keys, values, length, mask, scale)


def experts(
    x_TH: Tensor,
    token_N: Tensor,
    offsets_E1: Tensor,
    weight_N: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
) -> Tensor:
    """``fused_experts`` (swiglu.py) for few rows: [T, H] sums over the pairs of each token."""
    bounds = offsets_E1.tolist()
    return torch.ops.unimoe.few_rows_experts.default(
        x_TH, token_N, bounds, weight_N, [gate_up_proj], [down_proj]
    )


def moe(
    x_TH: Tensor,
    router_EH: Tensor,
    k: int,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    late: bool,
    renormalize: bool,
    scale: float = 1.0,
) -> MoEOutput:
    """A whole MoE layer: router, softmax, selection, experts and their weighted sum.

    Args:
        x_TH: the tokens.
        router_EH: the router's weights; experts behind those of ``gate_up_proj`` are null experts, whose
            output is zero.
        k: experts that each token visits.
        gate_up_proj: [E, 2I, H], gate rows first.
        down_proj: [E, H, I].
        late: the softmax is over the k selected logits; otherwise over all.
        renormalize: divide the selected scores by their sum, where the softmax is not late.
        scale: factor of all weights.
    """
    run = torch.ops.unimoe.few_rows_moe.default
    return MoEOutput(*run(x_TH, router_EH, k, late, renormalize, scale, [gate_up_proj], [down_proj]))
