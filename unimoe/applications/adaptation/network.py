"""Experts of domains, what an aggregator makes of their knowledge, and a student that adapts to it.

Shapes: B images, S side, D features, M experts, K classes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from unimoe.applications.transformer import FFN, Block
from unimoe.errors import UserError

Design = Literal["meta", "plain", "dense"]
Weights = dict[str, Tensor]
"""Weights of an encoder, by name."""


@dataclass
class NetworkConfig:
    """Sizes. The student, which alone predicts, is the same in all designs."""

    design: Design = "meta"
    """``meta``: the aggregator and the student are trained through the step; ``plain``: the same parts,
    trained without it; ``dense``: the student alone, which cannot adapt."""
    channels: int = 16
    """Channels of the first convolution of an encoder; it has four times as many features."""
    heads: int = 4
    """Heads of the aggregator's attention."""
    experts: int | None = None
    """Encoders in the bank; by default one for each training domain. Fewer get several domains each."""

    def __post_init__(self) -> None:
        for name in ("channels", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.network.{name} is {getattr(self, name)}, expected at least 1")
        if 4 * self.channels % self.heads:
            raise UserError(
                f"model.network.channels is {self.channels}, expected four times it to be a multiple of "
                f"model.network.heads, {self.heads}"
            )
        if self.experts is not None and self.experts < 2:
            raise UserError(f"model.network.experts is {self.experts}, expected at least 2")


class Encoder(nn.Module):
    """Three convolutions that halve the side, and the mean over positions: [B, 3, S, S] -> [B, D]."""

    def __init__(self, channels: int):
        super().__init__()
        sizes = [3, channels, 2 * channels, 4 * channels]
        self.steps = nn.Sequential()
        for before, after in zip(sizes, sizes[1:], strict=False):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
            self.steps.extend([conv, nn.GroupNorm(1, after), nn.GELU()])
        self.norm = nn.LayerNorm(sizes[-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.steps(images).mean(dim=(2, 3)))


class Aggregator(nn.Module):
    """One transformer block over the experts' features as tokens, and their mean: [B, M, D] -> [B, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        # without a bias: that of keys changes nothing, so its gradient is noise, which Adam makes steps of
        self.block = Block(width, heads, lambda: FFN(width, 2 * width), qkv_bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, features_BMD: Tensor) -> Tensor:
        return self.norm(self.block(features_BMD).mean(dim=1))


class MetaDMoE(nn.Module):
    """Meta-DMoE (arXiv 2210.03885).

    The paper's encoders are pretrained networks with batch normalisation, frozen in the last stage; these are
    small, and normalise groups and features. One head classifies the features of student and aggregator, so
    that they share a space from the start; in the paper each has its own.
    """

    def __init__(self, config: NetworkConfig, classes: int, expert_of: list[int]):
        """
        Args:
            config: sizes.
            classes: K.
            expert_of: the expert of each training domain.
        """
        super().__init__()
        self.config, self.expert_of = config, expert_of
        width = 4 * config.channels
        self.student, self.head = Encoder(config.channels), nn.Linear(width, classes)
        count = 0 if config.design == "dense" else max(expert_of) + 1
        self.experts = nn.ModuleList(Encoder(config.channels) for _ in range(count))
        self.expert_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(count))
        self.aggregator = Aggregator(width, config.heads) if count else None

    def bank(self) -> list[nn.Parameter]:
        """The weights of the experts."""
        return [*self.experts.parameters(), *self.expert_heads.parameters()]

    def knowledge(self, images: Tensor, domain: int = -1) -> Tensor:
        """[B, D] what the experts know about images; no gradient reaches the experts.

        Args:
            images: [B, 3, S, S].
            domain: the training domain of the images, whose expert is left out; -1 for another one.
        """
        own = -1 if domain < 0 else self.expert_of[domain]
        with torch.no_grad():
            features = [expert(images) for place, expert in enumerate(self.experts) if place != own]
        assert self.aggregator is not None
        return self.aggregator(torch.stack(features, dim=1))

    def adapt(self, images: Tensor, rate: float, domain: int = -1, differentiable: bool = False) -> Weights:
        """The student's weights after one step of its features towards the knowledge about unlabeled images.

        Args:
            images: [B, 3, S, S].
            rate: learning rate of the step.
            domain: the training domain of the images, as in :meth:`knowledge`.
            differentiable: whether a gradient is to flow through the step, to student and aggregator.
        """
        weights: Weights = dict(self.student.named_parameters())
        if self.aggregator is None:
            return weights
        error = F.mse_loss(functional_call(self.student, weights, images), self.knowledge(images, domain))
        gradients = torch.autograd.grad(error, list(weights.values()), create_graph=differentiable)
        return {
            name: weight - rate * gradient
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
        }

    def logits(self, images: Tensor, weights: Weights | None = None) -> Tensor:
        """[B, K] of the student, by its own weights or by adapted ones."""
        features = self.student(images) if weights is None else functional_call(self.student, weights, images)
        return self.head(features)

    @staticmethod
    def of(network: dict[str, Any]) -> "MetaDMoE":
        """Build the network from the content of ``config.json``."""
        sizes = NetworkConfig(**network["network"])
        return MetaDMoE(sizes, len(network["data"]["classes"]), network["expert_of"])
