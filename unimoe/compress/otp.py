"""OTP, the learned pruning of MC#: a small head says how many of its experts each token keeps.

Shapes: T tokens, K slots of a token (also its patterns), L MoE layers, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.records import current_context
from unimoe.moe.view import MoEView

from .rows import real_tokens, rewritten
from .skip import drop


class KeepHead(nn.Module):
    """Scores of "keep the first j experts", j = 1..K, from a token and its sorted weights.

    MC# (arXiv 2510.10962, section 4) chooses among patterns with a light router; neither its sizes nor its
    patterns are published. Here: Linear - ReLU - Linear, and the K prefixes of the experts sorted by weight.
    At the start it keeps all: the last pattern leads by ``lead``.
    """

    def __init__(self, hidden_size: int, top_k: int, width: int = 64, lead: float = 4.0):
        super().__init__()
        self.top_k, self.lead = top_k, lead
        self.up = nn.Linear(hidden_size + top_k, width)
        self.down = nn.Linear(width, top_k)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.up.reset_parameters()
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        with torch.no_grad():
            self.down.bias[-1] = self.lead

    def forward(self, x_TD: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, K] logits of the patterns; ``weight_TK`` descends."""
        both = torch.cat([x_TD.to(self.up.weight.dtype), weight_TK.to(self.up.weight.dtype)], dim=1)
        return self.down(self.up(both).relu())


def soft_mask(logits_TK: Tensor, noise_TK: Tensor, temperature: float) -> Tensor:
    """[T, K] in 0..1: how far each of the sorted experts is kept; the first always is.

    Gumbel-softmax over the patterns (MC#, eq. 11); expert i is part of the patterns that keep at least i.
    """
    pattern_TK = ((logits_TK.log_softmax(-1) + noise_TK) / temperature).softmax(-1)
    return pattern_TK.flip(1).cumsum(1).flip(1)


def hard_mask(logits_TK: Tensor) -> Tensor:
    """[T, K] bool: the experts of the most probable pattern."""
    last_T1 = logits_TK.argmax(dim=1, keepdim=True)
    return torch.arange(logits_TK.shape[1], device=logits_TK.device) <= last_T1


def gumbel(like: Tensor) -> Tensor:
    """Noise of the standard Gumbel distribution."""
    return -torch.log(torch.empty_like(like).exponential_())


@dataclass(frozen=True)
class Heads:
    """Skip what a head at each MoE layer says; the kept weights stay as they are."""

    width: int = 64
    """Hidden units of a head."""

    def attach(self, layers: Sequence[MoEView]) -> None:
        """Give each layer its head, a child of the block named ``keep_head``."""
        for layer in layers:
            weight = layer.router_rows()
            head = KeepHead(weight.shape[1], layer.top_k, self.width)
            layer.block.keep_head = head.to(weight.device, torch.float32)

    def apply(
        self, layer: MoEView, layers: int, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The routing of one of ``layers`` MoE layers without what is skipped."""
        weight_TK, order_TK = weight_TK.sort(dim=1, descending=True, stable=True)
        index_TK = index_TK.gather(1, order_TK)
        head: Any = layer.block.keep_head
        return drop(index_TK, weight_TK, ~hard_mask(head(x_TD, weight_TK)), layer.num_experts)

    def to_plan(self) -> dict[str, Any]:
        """Settings of the rule as a plan keeps them."""
        return {"rule": "heads", "width": self.width}

    def check(self, layers: int) -> None:
        """
        Raises:
            UserError: the width is below 1.
        """
        if self.width < 1:
            raise UserError(f"skip: the width of the heads is {self.width}, expected at least 1")


class Masking:
    """A rewriting that trains the heads: ``kept`` collects the mean share of experts that each forward pass
    of a layer keeps, padding left out."""

    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature
        self.kept: list[Tensor] = []

    def __call__(
        self, layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight_TK, order_TK = weight_TK.sort(dim=1, descending=True, stable=True)
        head: Any = layer.block.keep_head
        logits_TK = head(x_TD, weight_TK)
        mask_TK = soft_mask(logits_TK, gumbel(logits_TK), self.temperature)
        self.kept.append(mask_TK[real_tokens(current_context(), len(x_TD), x_TD.device)].mean())
        return index_TK.gather(1, order_TK), weight_TK * mask_TK.to(weight_TK.dtype)

    @contextmanager
    def at(self, layers: Sequence[MoEView], done: float) -> Iterator[None]:
        """Inside, the model keeps experts softly, after a share of the steps: the temperature falls from 1 to
        0.1."""
        self.temperature = 0.1**done
        with rewritten(layers, self):
            yield

    def penalty(self) -> Tensor:
        """Mean kept share since the last call (MC#'s ||m||_1, divided by its largest value)."""
        kept, self.kept = torch.stack(self.kept).mean(), []
        return kept
