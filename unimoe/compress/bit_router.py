"""A router of bits: how many bits of an expert's weights a token reads (D2MoE, arXiv 2504.15299, section 4).

The paper does not describe the router's form; here it is one linear map per expert. Shapes: N (token, expert)
pairs, D hidden, E experts, B numbers of bits, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BitRouter(nn.Module):
    """Linear(D, B) in front of each of E experts.

    Args:
        bits: the numbers of bits, ascending. A router that was not trained prefers the highest.
    """

    def __init__(self, num_experts: int, hidden_size: int, bits: Sequence[int]):
        super().__init__()
        self.bits = list(bits)
        self.weight = nn.Parameter(torch.zeros(num_experts, len(self.bits), hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts, len(self.bits)))
        nn.init.constant_(self.bias[:, -1], 4.0)

    def forward(self, x_ND: Tensor, expert_N: Tensor) -> Tensor:
        """Probability [N, B] of each number of bits for rows ``x_ND`` of the experts ``expert_N``."""
        logits_NB = self.bias[expert_N].float()
        for expert in expert_N.unique().tolist():
            rows = expert_N == expert
            logits_NB[rows] = logits_NB[rows] + x_ND[rows].float() @ self.weight[expert].float().t()
        return logits_NB.softmax(-1)


def mixture(y_BND: Tensor, p_NB: Tensor) -> Tensor:
    """[N, D] outputs for training: those at each number of bits, weighted by their probability.

    In use a row takes the most probable number alone.
    """
    return (y_BND * p_NB.t()[..., None].to(y_BND.dtype)).sum(0)


def capped(p_NB: Tensor, capacity: Sequence[float], generator: torch.Generator | None = None) -> Tensor:
    """[N] the choice of each row, -1 where it found no place.

    Args:
        p_NB: probabilities.
        capacity: share of the rows that may take each number of bits. Which rows lose their place is random.
    """
    choice_N = p_NB.argmax(-1)
    for choice, share in enumerate(capacity):
        rows = (choice_N == choice).nonzero().flatten()
        places = int(share * len(p_NB))
        if len(rows) > places:
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            choice_N[rows[order[places:]]] = -1
    return choice_N


def bit_loss(
    logits_V: Tensor, teacher_V: Tensor, p_layers: Sequence[Tensor], bits: Sequence[int], alpha: float
) -> Tensor:
    """Cross-entropy with the full model's distribution, plus ``alpha`` times the mean of the expected bits.

    Args:
        logits_V: [..., V] of the model with bit routers.
        teacher_V: [..., V] of the full model.
        p_layers: [N, B] of each layer.
        bits: the B numbers.
        alpha: price of a bit.
    """
    distilled = F.cross_entropy(logits_V.flatten(0, -2), teacher_V.flatten(0, -2).softmax(-1))
    price = torch.tensor(bits, dtype=torch.float32, device=logits_V.device)
    return distilled + alpha * torch.stack([(p.float() @ price).mean() for p in p_layers]).mean()
