"""Orthogonal LoRA."""

import torch
from torch import Tensor

from unimoe.errors import UserError

from .base import Strategy


class OLoRA(Strategy):
    """A LoRA per task, earlier ones frozen and summed; loss + lambda sum_{i<t} |A_t A_i^T|_1 (Wang et al.,
    arXiv 2310.14152), the entrywise sum over all projections."""

    name = "olora"
    shares_adapters = False

    def __init__(self, orthogonality: float = 0.5):
        """
        Args:
            orthogonality: lambda (0.5 in the official long run and Prism, 0.05 in MCITlib).

        Raises:
            UserError: for a negative one.
        """
        super().__init__()
        if orthogonality < 0:
            raise UserError(f"olora needs orthogonality of at least 0, found {orthogonality}")
        self.orthogonality = orthogonality

    def model_adaptation(self, index: int) -> None:
        self.learner.add_lora()

    def penalty(self) -> Tensor:
        return self.orthogonality * self.overlap()

    def overlap(self) -> Tensor:
        """sum over projections and earlier tasks of |A_t A_i^T|_1."""
        total = torch.zeros((), device=self.learner.device)
        for layer in self.learner.layers.values():
            *old, new = layer.lora_banks
            for bank in old:
                total = total + (new.A @ bank.A.T).abs().sum()
        return total
