"""Experts that start as whole FFNs: copies of one (sparse upcycling, Komatsuzaki et al., arXiv 2212.05055),
or one dense model per expert (Uni-MoE, arXiv 2405.11273, section 3).

Shapes: E experts, H hidden, I intermediate.
"""

from collections.abc import Sequence

from torch import nn

from unimoe.moe.experts.swiglu import SwiGLUExperts

from .slice import split_experts


def from_dense(mlps: Sequence[nn.Module], noise: float = 0.0) -> SwiGLUExperts:
    """One expert per dense FFN, all of the same shape; ``noise`` as in :func:`copy_experts`."""
    return split_experts(mlps, 1, noise)


def copy_experts(mlp: nn.Module, num_experts: int, noise: float = 0.0) -> SwiGLUExperts:
    """``num_experts`` copies of one FFN. The layer equals the FFN under any router whose weights sum to 1.

    ``noise`` adds Gaussian noise of that many standard deviations of each weight matrix.
    """
    return split_experts([mlp] * num_experts, 1, noise)
