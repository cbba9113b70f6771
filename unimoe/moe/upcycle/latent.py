"""Experts in a latent space that start as a projection of dense FFNs.

Shapes: E experts, D = H hidden, I intermediate, L latent, R rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unimoe.moe.experts.latent import LatentExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.parts import EXPERTS

from .slice import split_experts


@EXPERTS.register(
    "latent_space",
    source="LatentMoE, arXiv 2601.18089; NemotronHMoE of transformers",
    axis="FFN",
    exact="size = hidden size; whole copies, or all slices of one copy",
    healing="experts of a smaller size: the directions left out are missing",
    indivisible=LatentExperts.indivisible,
)
@torch.no_grad()
def latent_experts(
    mlps: Sequence[nn.Module], slices: int, size: int | None = None, noise: float = 0.0
) -> LatentExperts:
    """The experts of :func:`~unimoe.moe.upcycle.slice.split_experts` in a latent space.

    Reading and writing keep the directions that the FFNs' weights use most: the leading right singular
    vectors of all gate and up rows, and the leading left ones of all down matrices. Below the hidden size the
    start is not the dense model, so it needs training first.

    Args:
        mlps: the dense FFNs.
        slices: of each.
        size: size of the latent space; None is a quarter of the hidden size, as in Nemotron 3 Super.
        noise: Gaussian noise on each expert's weights, in standard deviations of each weight matrix.

    Raises:
        UserError: an FFN is not a bias-free SwiGLU FFN or cannot be cut evenly, or ``size`` is out of range.
    """
    whole = split_experts(mlps, slices, noise)
    gate_up, down = whole.gate_up_proj, whole.down_proj
    hidden, inner = down.shape[1:]
    size = max(1, hidden // 4) if size is None else size
    with torch.device("meta"):
        latent = LatentExperts(SwiGLUExperts(len(down), size, inner, whole.act), hidden, size)
    read_LD = leading_directions(gate_up.flatten(0, 1), size)
    write_LD = leading_directions(down.transpose(1, 2).flatten(0, 1), size)
    latent.down, latent.up = nn.Parameter(read_LD), nn.Parameter(write_LD.T.contiguous())
    latent.inner.gate_up_proj = nn.Parameter(gate_up @ read_LD.T)
    latent.inner.down_proj = nn.Parameter(write_LD @ down)
    return latent


def leading_directions(rows_RD: Tensor, size: int) -> Tensor:
    """[L, D] orthonormal directions of the largest share of the rows, by the eigenvectors of their Gram
    matrix."""
    exact_RD = rows_RD.double()
    vectors_DD = torch.linalg.eigh(exact_RD.T @ exact_RD).eigenvectors  # ascending
    return vectors_DD[:, -size:].T.to(rows_RD.dtype)
