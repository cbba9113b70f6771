"""Grouped two-layer FFN experts with biases in Triton: ``fused_ffn_experts`` of ffn.py for CUDA.

The products are Triton's and the activation is torch's. Shapes are those of ffn.py.
"""

from torch import Tensor

from .ffn import ACTS
from .triton_linear import GroupedRows, bias, linear


def fused_ffn_experts(
    x: Tensor,
    offsets_E1: Tensor,
    up_proj: Tensor,
    up_bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
    act: str = "relu",
    weight_N: Tensor | None = None,
    token_N: Tensor | None = None,
) -> Tensor:
    """:func:`~unimoe.kernels.ffn.fused_ffn_experts`, whose arguments and result it has."""
    pairs = GroupedRows.of(x, offsets_E1, token_N)
    h_NI = linear(x, up_proj, pairs, gather=True) + bias(up_bias, pairs)
    y_NH = linear(ACTS[act](h_NI), down_proj, pairs) + bias(down_bias, pairs)
    return pairs.sum(y_NH if weight_N is None else y_NH * pairs.owned(weight_N))
