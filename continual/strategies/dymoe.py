"""LLaVA-DyMoE (arXiv 2603.27481), and IncMoELoRA, which is DyMoE with both of its parts off."""

from typing import Any

import torch
from torch import Tensor, nn

from unimoe.continual.guidance import TYPES, GuidanceConfig, Guide
from unimoe.continual.learner import Learner, valid_tokens
from unimoe.continual.router import CosineTopK
from unimoe.continual.routing_log import by_block, over_ranks
from unimoe.continual.stream import Experience
from unimoe.data.collate import real_tokens
from unimoe.model.loss import answer_logits
from unimoe.training.ranks import rank_weighted

from .base import Strategy


class IncMoELoRA(Strategy):
    """A new bank of experts and router rows per task, top-k over all banks; old banks and rows are frozen."""

    name = "incmoelora"

    def __init__(self, k: int | None = None, scale: float = 1.0, temperature: float = 0.01):
        """
        Args:
            k: experts that a token keeps out of all banks (default: as many as a bank has, the paper's).
            scale: gamma, on the cosines.
            temperature: of the softmax over the kept.
        """
        super().__init__()
        self.k, self.scale, self.temperature = k, scale, temperature
        self.guide = Guide(GuidanceConfig(assign=False, exclusivity=0.0, specialization=0.0))

    def attach(self, learner: Learner) -> None:
        super().attach(learner)
        for name, layer in learner.layers.items():
            layer.gating = CosineTopK(
                layer.in_features,
                learner.config.experts if self.k is None else self.k,
                self.scale,
                self.temperature,
                self.guide,
                name,
            )
            layer.gating.to(layer.weight.device)

    def grow(self, index: int) -> None:
        self.learner.grow_experts()
        for layer in self.learner.layers.values():
            layer.gating.grow(self.learner.config.experts)  # type: ignore[union-attr]

    def begin(self, task: Experience) -> None:
        super().begin(task)
        self.guide.start(guided=task.index > 0)

    def loss(self, batch: list[dict[str, Any]], step: int, steps: int) -> Tensor:
        """Cross-entropy plus the mean over routers and tokens of the guide's losses."""
        self.guide.step, self.guide.steps, self.guide.watching = step, steps, self.watched
        total, count = torch.zeros((), device=self.learner.device), 0
        routing, tokens = torch.zeros((), device=self.learner.device), 0
        for part in batch:
            with self.guide.collect(valid_tokens(part)) as terms:
                logits_SV, labels_S = answer_logits(self.learner.model, part)
            total = total + nn.functional.cross_entropy(logits_SV, labels_S, reduction="sum")
            count += len(labels_S)
            real = real_tokens(part)
            tokens += real
            if terms:
                routing = routing + real * sum(terms) / len(self.learner.layers)
        return rank_weighted(total / max(count, 1), count) + rank_weighted(routing / max(tokens, 1), tokens)

    def end(self, task: Experience) -> None:
        super().end(task)
        self.guide.guided, self.guide.watching = False, True

    def observed(self) -> dict[str, Any]:
        """Shares of token types, target of the losses and mass of each bank, by block of the decoder and over
        all processes."""
        return by_block(over_ranks(self.guide.take(), self.learner.device), TYPES)


class DyMoE(IncMoELoRA):
    """IncMoELoRA with token assignment guidance and the routing-score losses (guidance.py)."""

    name = "dymoe"

    def __init__(self, guidance: GuidanceConfig | None = None, **routing: Any):
        """
        Args:
            guidance: the two parts and their switches.
            routing: what IncMoELoRA takes.
        """
        super().__init__(**routing)
        self.guide.config = guidance or GuidanceConfig()
