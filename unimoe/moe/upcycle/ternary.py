"""Ternary experts that start from dense FFNs."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from unimoe.errors import UserError
from unimoe.moe.experts.ternary import TernaryExperts
from unimoe.moe.install import moe_layers
from unimoe.moe.parts import EXPERTS

from .slice import split_experts


@EXPERTS.register(
    "ternary",
    source="MoTE, arXiv 2506.14435; quantizers: BitNet b1.58, arXiv 2402.17764, eq. 1-3",
    axis="FFN",
    healing="experts: ternary weights are far from the FFN's; a frozen shared FFN keeps the start near",
)
def ternary_experts(
    mlps: Sequence[nn.Module], slices: int, packed: bool = False, noise: float = 0.0
) -> TernaryExperts:
    """SwiGLU FFNs with weights of three values and activations of 8 bits, in training as in inference.

    Args:
        mlps: the dense FFNs, which the full-precision weights are copies of.
        slices: of each.
        packed: 2 bits a weight, for inference only (``unimoe.moe.pack_ternary``).
        noise: Gaussian noise on each expert's weights, in standard deviations of each weight matrix.

    Raises:
        UserError: an FFN is not a bias-free SwiGLU FFN or cannot be cut evenly.
    """
    whole = split_experts(mlps, slices, noise)
    experts = TernaryExperts(whole.gate_up_proj.data, whole.down_proj.data, whole.act)
    if packed:
        experts.pack()
    return experts


def pack_ternary(model: Any) -> None:
    """Pack the ternary experts of a model of this package in place; saved, they take 2 bits a weight.

    Raises:
        UserError: its experts are of another kind, or packed already.
    """
    kind = (model.config.moe or {}).get("experts", {}).get("kind", "no")
    if kind != "ternary" or model.config.moe["experts"]["packed"]:
        raise UserError(f"the model has {kind} experts, expected ternary ones that are not packed yet")
    for layer in moe_layers(model).values():
        cast(TernaryExperts, layer.experts).pack()
    model.config.moe = {**model.config.moe, "experts": {**model.config.moe["experts"], "packed": True}}
