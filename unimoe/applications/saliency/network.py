"""A transformer with two tasks: a set of plausible masks of an image, and the preference for a given mask.

Shapes: B images, S side, C channels, N patches of an image, D width, Q prompts, K masks, M mask features,
T tokens.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.applications.transformer import FFN, Block, check_sizes, grid_places
from unimoe.errors import UserError
from unimoe.moe import Context, FFNExperts, LabelRouter, MoELayer, TopK, routing_context

Design = Literal["psod", "switch", "dense"]
PATCH = 8
"""Side of a patch, which the stem makes a token of."""
MASKS, QUALITY = 0, 1
"""The tasks, and the numbers of their experts."""


@dataclass
class NetworkConfig:
    """Sizes of the transformer. All designs have the same number of active parameters."""

    design: Design = "psod"
    """``psod``: in each block an FFN for each task; ``switch``: two FFNs, of which a router chooses one for
    each token; ``dense``: one FFN."""
    width: int = 96
    """Width of a token."""
    depth: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    ffn: float = 4.0
    """Inner width of an FFN over the width of a token."""
    queries: int = 5
    """Learned prompts for masks, each of which gives one."""

    def __post_init__(self) -> None:
        check_sizes("model.network", self, "width", "depth", "heads", "queries", multiple=4)
        if self.ffn <= 0:
            raise UserError(f"model.network.ffn is {self.ffn}, expected above 0")

    @property
    def losses(self) -> dict[str, float]:
        """Auxiliary losses, name -> coefficient."""
        return {"balance": 0.01} if self.design == "switch" else {}


def make_ffn(config: NetworkConfig, index: int) -> nn.Module:
    """The FFN of block ``index``, or its experts for the two tasks."""
    width, inner = config.width, round(config.ffn * config.width)
    if config.design == "dense":
        return FFN(width, inner)
    if config.design == "psod":
        router = LabelRouter(2)
    else:
        router = TopK(width, 2, 1, gating="softmax_topk", renormalize=False, scale=2.0)
    return MoELayer(router, FFNExperts(2, width, inner, act="gelu"), layer_index=index)


class Stem(nn.Module):
    """Convolutions from an image and a mask to features [B, C, side, side] at a half, a quarter and an eighth
    of the side."""

    def __init__(self, width: int):
        super().__init__()
        sizes = [4, width // 4, width // 2, width]
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(1, b), nn.GELU())
            for a, b in zip(sizes, sizes[1:], strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for step in self.steps:
            x = step(x)
            found.append(x)
        return found


class SaliencyNet(nn.Module):
    """PSOD (arXiv 2409.02368): attention is shared by the tasks, FFNs are not.

    The paper's backbone is DaViT; here it is a plain transformer behind convolutions.

    1. the stem makes tokens of the image and, for a score, of the mask that is to be judged
    2. learned prompts of the task follow them; blocks, whose routers see the task
    3. masks: each prompt's token, times features of the pixels at half the side, enlarged. Score: a linear
       map of its prompt's token
    """

    def __init__(self, config: NetworkConfig, side: int):
        """
        Args:
            config: sizes.
            side: height and width of an image, a multiple of 8.
        """
        super().__init__()
        self.config, width = config, config.width
        self.stem = Stem(width)
        self.register_buffer("places_ND", grid_places(side // PATCH, width), persistent=False)
        self.prompts = nn.ParameterList(torch.empty(count, width) for count in (config.queries, 1))
        for prompts_QD in self.prompts:
            nn.init.normal_(prompts_QD)
        # without a bias: that of keys changes nothing, so its gradient is noise, which Adam makes steps of
        self.blocks = nn.ModuleList(
            Block(width, config.heads, partial(make_ffn, config, index), qkv_bias=False)
            for index in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)
        features = width // 2
        self.from_tokens, self.from_quarter = nn.Linear(width, features), nn.Conv2d(width // 2, features, 1)
        self.from_half = nn.Conv2d(width // 4, features, 1)
        self.pixels = nn.Conv2d(features, features, 3, padding=1)
        self.masks_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, features + 1))
        self.score_head = nn.Linear(width, 1)

    def masks(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] in -1..1 -> logits [B, K, S, S]."""
        x_BND, answer_BQD, (half, quarter, _) = self._tokens(images, None, MASKS)
        # (3)
        grid = self.from_tokens(x_BND).mT.unflatten(2, (images.shape[2] // PATCH, -1))
        pixels = self.from_half(half) + _enlarged(self.from_quarter(quarter) + _enlarged(grid))
        pixels_BMHH = self.pixels(F.gelu(pixels))
        query_BKM, bias_BK1 = self.masks_head(answer_BQD).tensor_split([-1], dim=2)
        logits_BKHH = torch.einsum("bkm,bmhw->bkhw", query_BKM, pixels_BMHH) * pixels_BMHH.shape[1] ** -0.5
        return _enlarged(logits_BKHH + bias_BK1[..., None])

    def scores(self, images: Tensor, masks_BSS: Tensor) -> Tensor:
        """[B, 3, S, S] and float masks [B, S, S] of 0 and 1 -> [B] in 0..1."""
        _, answer_B1D, _ = self._tokens(images, masks_BSS, QUALITY)
        return self.score_head(answer_B1D)[:, 0, 0].sigmoid()

    def _tokens(
        self, images: Tensor, masks_BSS: Tensor | None, task: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Tokens [B, N, D] of the patches and [B, Q, D] of the prompts, and the stem's features."""
        # (1)
        plane = torch.zeros_like(images[:, 0]) if masks_BSS is None else 2 * masks_BSS - 1
        features = self.stem(torch.cat([images, plane[:, None]], dim=1))
        x_BND = features[-1].flatten(2).mT + self.places_ND
        # (2)
        x_BND = torch.cat([x_BND, self.prompts[task].expand(len(images), -1, -1)], dim=1)
        samples = torch.arange(len(images), device=images.device)
        ctx = Context(
            sample_T=samples.repeat_interleave(x_BND.shape[1]), label_B=torch.full_like(samples, task)
        )
        with routing_context(ctx):
            for block in self.blocks:
                x_BND = block(x_BND)
        patches = features[-1].shape[2] ** 2
        return *self.norm(x_BND).tensor_split([patches], dim=1), features

    @staticmethod
    def of(network: dict[str, Any]) -> "SaliencyNet":
        """Build the network from the content of ``config.json``."""
        return SaliencyNet(NetworkConfig(**network["network"]), network["data"]["side"])


def _enlarged(x: Tensor) -> Tensor:
    """[B, C, side, side] of twice the side."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
