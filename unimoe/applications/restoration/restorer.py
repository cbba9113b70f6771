"""A small vision transformer that predicts what weather added to an image; its FFNs may be mixtures.

Shapes: B images, S side, C channels at full resolution, N tokens of an image, D width, T = B N.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.applications.transformer import FFN, Block, check_sizes
from unimoe.errors import UserError
from unimoe.moe import (
    Context,
    FFNExperts,
    FiLMExperts,
    MoEConfig,
    MoELayer,
    Router,
    TopK,
    UncertainRouter,
    routing_context,
)

Design = Literal["mofme", "mofme_top_k", "ffn_moe", "dense"]


@dataclass
class RestorerConfig:
    """Sizes of the transformer."""

    design: Design = "mofme"
    """The FFN of each block: ``mofme`` (FiLM experts between a shared trunk and a shared FFN, router
    ``uncertain``), ``mofme_top_k`` (the same with a plain router), ``ffn_moe`` (FFN experts) or ``dense``."""
    patch: int = 4
    """Height and width of a patch, which is one token."""
    channels: int = 24
    """Channels of the convolutions at full resolution."""
    width: int = 64
    """Width of a token."""
    depth: int = 3
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    ffn: int = 4
    """Active parameters of an FFN, in units of 2 * width^2; the same in all designs."""
    experts: int = 4
    """Experts of a mixture."""
    k: int = 2
    """Experts that a token visits."""

    def __post_init__(self) -> None:
        check_sizes("model.restorer", self, "patch", "channels", "width", "depth", "heads", "ffn")
        if not 1 <= self.k <= self.experts:
            raise UserError(f"model.restorer.k is {self.k}, expected 1 to {self.experts}, the experts")
        if self.design.startswith("mofme") and self.ffn < self.k + 2:
            raise UserError(
                f"model.restorer.ffn is {self.ffn}, expected at least {self.k + 2}: the trunk, {self.k} "
                "experts and the shared FFN"
            )

    @property
    def losses(self) -> dict[str, float]:
        """Auxiliary losses, name -> coefficient (``configs/moe/mofme.yaml``)."""
        return {} if self.design == "dense" else MoEConfig.from_dict({"preset": "mofme"}).coefficients


class SharedFFN(nn.Module):
    """The FFN behind the weighted sum of experts, as ``finish`` of a layer."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.ffn = FFN(width, inner)

    def forward(self, x_TD: Tensor, y_TD: Tensor) -> Tensor:
        return self.ffn(y_TD)


class MoFME(nn.Module):
    """MoFME's FFN (arXiv 2312.16610): FFN(sum of r_i (g_i(t) t + b_i(t))) on the trunk t = GELU(A x) B x, as
    in the authors' code.

    A token visits the trunk (2 D^2 parameters), k experts of 2 D^2 and the FFN, which has the rest of
    2 ``ffn`` D^2.
    """

    def __init__(self, config: RestorerConfig, index: int):
        super().__init__()
        width = config.width
        kind: type[Router] = UncertainRouter if config.design == "mofme" else TopK
        self.gate, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.layer = MoELayer(
            kind(width, config.experts, config.k),
            FiLMExperts(config.experts, width),
            layer_index=index,
            finish=SharedFFN(width, (config.ffn - config.k - 1) * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.gelu(self.gate(x)) * self.value(x))


def make_ffn(config: RestorerConfig, index: int) -> nn.Module:
    """The FFN of block ``index``, [..., D] -> [..., D]."""
    width, inner = config.width, config.ffn * config.width
    if config.design == "dense":
        return FFN(width, inner)
    if config.design == "ffn_moe":
        experts = FFNExperts(config.experts, width, inner // config.k, act="gelu")
        return MoELayer(TopK(width, config.experts, config.k), experts, layer_index=index)
    return MoFME(config, index)


class Restorer(nn.Module):
    """Restores images taken in bad weather.

    1. a convolution at full resolution; its patches become tokens
    2. blocks; the image's number is in the context of their routers
    3. tokens become patches, which the convolutions' channels are added to
    4. two convolutions predict a factor and a summand of each value, at the start 1 and 0: haze is undone by
       the one (J = I / t + ...), rain and snow by the other
    """

    def __init__(self, config: RestorerConfig):
        super().__init__()
        self.config = config
        channels, patch = config.channels, config.patch
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.embed = nn.Conv2d(channels, config.width, patch, stride=patch)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, partial(make_ffn, config, index))
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.unembed = nn.Linear(config.width, channels * patch**2)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Conv2d(channels, 6, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, x_B3SS: Tensor) -> Tensor:
        """[B, 3, S, S] in 0..1 -> the same, not clipped. The patch divides S."""
        # (1)
        full_BCSS = self.stem(2 * x_B3SS - 1)
        grid = self.embed(F.gelu(full_BCSS))
        x_BND = grid.flatten(2).transpose(1, 2)
        # (2)
        sample_T = torch.arange(len(x_BND), device=x_BND.device).repeat_interleave(x_BND.shape[1])
        with routing_context(Context(sample_T=sample_T)):
            for block in self.blocks:
                x_BND = block(x_BND)
        # (3)
        patches = self.unembed(self.norm(x_BND)).transpose(1, 2).unflatten(2, grid.shape[2:])
        full_BCSS = F.gelu(full_BCSS + F.pixel_shuffle(patches, self.config.patch))
        # (4)
        scale_B3SS, shift_B3SS = self.head(F.gelu(self.mix(full_BCSS))).chunk(2, dim=1)
        return x_B3SS * (1 + scale_B3SS) + shift_B3SS

    @staticmethod
    def of(network: dict[str, Any]) -> "Restorer":
        """Build the network from the content of ``config.json``."""
        return Restorer(RestorerConfig(**network["restorer"]))
