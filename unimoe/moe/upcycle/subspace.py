"""Experts that are subspaces of a dense FFN.

Shapes: B units of the FFN, D hidden.
"""

from collections.abc import Sequence

import torch
from torch import nn

from unimoe.errors import UserError
from unimoe.moe.experts.subspace import SubspaceExperts
from unimoe.moe.parts import EXPERTS

from .read import read_gate, read_swiglu


@EXPERTS.register(
    "subspace",
    source="CDSP-MoE, arXiv 2512.20291; initial values: the authors' code",
    axis="FFN",
    healing="experts: each is a part of the FFN, scaled by its influence",
    indivisible=SubspaceExperts.indivisible,
)
def subspace_experts(mlps: Sequence[nn.Module], slices: int) -> SubspaceExperts:
    """Overlapping parts of one FFN: copies times slices experts, each with 1 / sqrt(experts) of its units.

    Args:
        mlps: the dense FFN, once for each copy.
        slices: further experts for each copy.

    Raises:
        UserError: the FFNs differ, or are no bias-free gated FFNs.
    """
    gate_up, down = read_swiglu(mlps[0])
    for slot, mlp in enumerate(mlps):
        if mlp is not mlps[0] and not all(map(torch.equal, read_swiglu(mlp), (gate_up, down))):
            raise UserError(f"moe.experts: subspace experts share one FFN, that of expert {slot} is another")
    parts = gate_up.unflatten(0, (2, -1)).clone(), down.clone()
    return SubspaceExperts(len(mlps) * slices, *parts, read_gate(mlps[0]))
