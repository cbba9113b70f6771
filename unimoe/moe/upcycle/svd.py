"""Experts with low-rank first matrices that start as the best approximation of dense FFNs.

Shapes: E experts, G groups, X experts of a group, D = H hidden, I intermediate, M rank.
"""

from collections.abc import Sequence

import torch
from torch import nn

from unimoe.errors import UserError
from unimoe.moe.experts.mole import MoLEExperts
from unimoe.moe.parts import EXPERTS

from .latent import leading_directions
from .slice import split_experts


@EXPERTS.register(
    "latent",
    source="MoLE, arXiv 2503.23100: factors and conversion by SVD",
    axis="FFN",
    exact="size = rank of a group's stacked gate and up matrices; whole copies, or all slices of one copy",
    healing="experts of a smaller size: the tail of the singular values is missing",
    indivisible=MoLEExperts.indivisible,
)
@torch.no_grad()
def svd_experts(
    mlps: Sequence[nn.Module], slices: int, size: int | None = None, group_size: int = 4, noise: float = 0.0
) -> MoLEExperts:
    """The experts of :func:`~unimoe.moe.upcycle.slice.split_experts` with gate and up matrices A_i B, whose B
    a group shares.

    B are the leading right singular vectors of the group's matrices, one above the other, and A_i = W_i B^T.
    No other A and B of this rank are nearer (Eckart-Young): the squared error of the weights is the sum of
    the squared singular values left out.

    Args:
        mlps: the dense FFNs.
        slices: of each.
        size: rank M of the products; None is half of the hidden size.
        group_size: neighbouring experts that share B, 4 to 8 in the paper; at most all of a layer.
        noise: Gaussian noise on each expert's weights before that, in standard deviations of each matrix.

    Raises:
        UserError: an FFN is not a bias-free SwiGLU FFN or cannot be cut evenly, ``size`` is out of range, or
            the experts do not divide into groups.
    """
    whole = split_experts(mlps, slices, noise)
    gate_up, down = whole.gate_up_proj, whole.down_proj
    experts, hidden, inner = down.shape
    size = max(1, hidden // 2) if size is None else size
    group = min(group_size, experts)
    if group < 1 or experts % group:
        found = f"moe.experts.group_size is {group_size}"
        raise UserError(f"{found}, expected a divisor of {experts} (the experts)")
    groups = experts // group
    with torch.device("meta"):
        found = MoLEExperts(experts, groups, hidden, inner, size, whole.act)
    w_GX2ID = gate_up.unflatten(1, (2, inner)).unflatten(0, (groups, -1))
    into_G2MD = torch.stack(
        [
            torch.stack([leading_directions(w_X2ID[:, part].flatten(0, 1), size) for part in (0, 1)])
            for w_X2ID in w_GX2ID
        ]
    )
    out = torch.einsum("gxpid,gpmd->gxpim", w_GX2ID, into_G2MD)
    found.into = nn.Parameter(into_G2MD.flatten(1, 2))
    found.out = nn.Parameter(out.flatten(2, 3).flatten(0, 1))
    found.down_proj = nn.Parameter(down.clone())
    return found
