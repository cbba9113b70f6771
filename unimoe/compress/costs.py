"""What few bits of one expert cost (Mixture Compressor, arXiv 2410.06270, section 3.2).

Shapes: L layers, E experts, C numbers of bits.
"""

from torch import Tensor

ERROR = (0.0, 0.0, 2.0)
"""The squared error of the layer's output alone, which holds frequency and weight already; errors of experts
that are not correlated add up."""
CODE = (1.0, 1.5, 1.0)
"""Exponents of frequency, weight and error as the released program has them: it reads the third, 2, but
raises the error to the first."""
PAPER = (1.0, 1.5, 2.0)
"""Exponents as the paper means them."""


def pmq_cost(
    count_LE: Tensor, weight_LE: Tensor, error_LEC: Tensor, powers: tuple[float, float, float] = CODE
) -> Tensor:
    """[L, E, C] cost phi^a w^b eps^c of an expert with a number of bits (eq. 4).

    Args:
        count_LE: calibration tokens of each expert; phi is its share of the layer's.
        weight_LE: sum of its routing weights over them; w is its share of the layer's. The paper sums the
            router's probabilities; where a router renormalises those that it chooses, weights are larger.
        error_LEC: Frobenius norm of the change of the layer's output if this expert alone has these bits.
        powers: a, b and c.
    """
    frequency_LE = count_LE.float() / count_LE.sum(-1, keepdim=True).clamp_min(1)
    weight_LE = weight_LE / weight_LE.sum(-1, keepdim=True).clamp_min(1e-12)
    a, b, c = powers
    return (frequency_LE**a * weight_LE**b)[..., None] * error_LEC**c
