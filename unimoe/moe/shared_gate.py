"""A learned factor of the shared experts' output for each token.

Shapes: T tokens, D hidden.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SharedGate(nn.Module):
    """[T, D] -> [T, 1]: ``sigmoid`` of a linear map, near 1/2 at the start (Qwen2-MoE, Qwen3-Next), or
    ``one_plus``: 1 + the linear map, 1 at the start (Qwen2MoeSparseMoeBlock of Shwai-He/SparseUnifiedModel).
    """

    def __init__(self, hidden_size: int, kind: Literal["sigmoid", "one_plus"], init_std: float = 0.02):
        super().__init__()
        self.kind, self.init_std = kind, init_std
        self.weight = nn.Parameter(torch.empty(1, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std if self.kind == "sigmoid" else 0.0)

    def forward(self, x_TD: Tensor) -> Tensor:
        logit_T1 = F.linear(x_TD, self.weight)
        return logit_T1.sigmoid() if self.kind == "sigmoid" else 1 + logit_T1

    def extra_repr(self) -> str:
        return self.kind
