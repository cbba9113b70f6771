"""Products of few rows, as in decoding: one token of each conversation at a time, without a backward pass.

Their time goes into reading the weights. The operators in native.cpp read each weight once and do nothing
else; torch's float32 products prepare their operands first, which does not pay with few rows. The operators
run only where they are built, and only inside :func:`unimoe.moe.few_rows.few_rows`.

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
"""With more, torch's products are as fast."""
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
    return (
        0 < x.numel() <= MOST_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and x.dtype is torch.float32
        and x.device.type == "cpu"
        and all(
            one.dtype is torch.float32 and one.device == x.device and one.is_contiguous() for one in weights
        )
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class FewRowsLinear(nn.Linear):
    """A Linear layer whose products of few rows are ours; all others, and everything else, are torch's."""

    def forward(self, input: Tensor) -> Tensor:
        # the operator trusts the widths, torch says what is wrong with them
        if input.shape[-1] != self.in_features or not few(input, self.weight):
            return super().forward(input)
        return torch.ops.unimoe.few_rows_linear.default(input, [self.weight], self.bias)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Rows [..., H] over the root of their mean square, times ``weight_H``."""
    return torch.ops.unimoe.few_rows_rms_norm.default(x, weight_H, eps)


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
