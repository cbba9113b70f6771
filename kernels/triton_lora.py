"""SwiGLU experts with a low-rank adapter per expert in Triton: ``fused_lora_experts`` of lora.py for CUDA.

The products are Triton's and the activation is torch's. Shapes are those of lora.py.
"""

from torch import Tensor

from .lora import Adapters
from .swiglu import GATES
from .triton_linear import GroupedRows, linear


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
    """:func:`~unimoe.kernels.lora.fused_lora_experts`, whose arguments and result it has."""
    pairs, (A1, B1, A2, B2) = GroupedRows.of(x, offsets_E1, token_N), adapters
    h_NF = linear(x, gate_up_proj, pairs, gather=True)
    h_NF = h_NF + scale * linear(linear(x, A1, pairs, gather=True), B1, pairs)
    gate_NI, up_NI = h_NF.chunk(2, dim=-1)
    act_NI = GATES[act](gate_NI) * up_NI
    if weight_N is not None:
        act_NI = act_NI * pairs.owned(weight_N)
    y_NH = linear(act_NI, down_proj, pairs) + scale * linear(linear(act_NI, A2, pairs), B2, pairs)
    return pairs.sum(y_NH)
