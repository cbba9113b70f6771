"""A diffusion transformer with adaLN-Zero (DiT, arXiv 2212.09748), whose FFNs may be a mixture of experts.

Shapes: B images, C channels, S side, N patches of an image, P values of a patch, D width, T = B N tokens,
F size of the time's embedding, X size of a text embedding.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe import (
    ConditionRouter,
    Context,
    FFNExperts,
    LinearExperts,
    MoEConfig,
    MoELayer,
    PrototypeRouter,
    routing_context,
)

Design = Literal["dense", "promoe", "switch_dit"]
FREQUENCIES = 256


@dataclass
class DiTConfig:
    """Sizes of a diffusion transformer."""

    side: int = 32
    """Height and width of an image, in pixels or latents."""
    channels: int = 3
    """Of an image."""
    patch: int = 4
    """Height and width of a patch, which is one token."""
    width: int = 128
    """Of a token."""
    depth: int = 6
    """Blocks."""
    heads: int = 4
    """Of attention."""
    ffn: float = 4.0
    """Inner width of an FFN over the width of a token; of all experts that a token visits together."""
    classes: int = 10
    """Labels; 0 where the condition is a text."""
    text: int = 0
    """Size of the text embeddings that are the condition; 0 where it is a class."""
    design: Design = "promoe"
    """``dense``; ``promoe`` (every other block's FFN, from the second); ``switch_dit`` (a mask of every
    block)."""
    experts: int = 12
    """Routed ones of an MoE layer. Switch-DiT has 3."""
    k: int = 1
    """Of these, how many a token (ProMoE) or a sample (Switch-DiT, 2) visits."""

    def __post_init__(self) -> None:
        if self.side % self.patch or self.width % self.heads or self.width % 4:
            raise UserError(
                f"model.dit: side {self.side}, patch {self.patch}, width {self.width}, heads {self.heads}: "
                "the patch must divide the side, and heads and 4 the width"
            )
        if bool(self.classes) == bool(self.text):
            raise UserError("model.dit: the condition is either one of classes or a text, not both")

    @property
    def losses(self) -> dict[str, float]:
        """Auxiliary losses of the design, name -> coefficient (``configs/moe/NAME.yaml``)."""
        if self.design == "dense":
            return {}
        return MoEConfig.from_dict({"preset": self.design}).coefficients


class FFN(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up_proj, self.act_fn, self.down_proj = (
            nn.Linear(width, inner),
            nn.GELU(),
            nn.Linear(inner, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


def promoe_layer(width: int, inner: int, experts: int, k: int, index: int) -> MoELayer:
    """ProMoE's FFN: ``experts`` routed ones, an unconditional and a shared one. A token visits k (or the
    unconditional one) and the shared one, whose inner widths are ``inner`` together."""
    one = inner // (k + 1)
    router = PrototypeRouter(width, experts + 1, k)
    shared = FFNExperts(1, width, one, act="gelu")
    return MoELayer(router, FFNExperts(experts + 1, width, one, act="gelu"), "weight", shared, index)


def switch_layer(width: int, experts: int, k: int, index: int) -> MoELayer:
    """Switch-DiT's mask of a block, 1 + the sum of k linear experts: 1 at the start."""
    router = ConditionRouter(width, experts, k)
    return MoELayer(router, LinearExperts(experts, width), layer_index=index, finish=lambda x, y: 1 + y)


class Block(nn.Module):
    """Attention and FFN, each modulated by the condition (adaLN-Zero).

    With ``mask`` (Switch-DiT) the block sees u = x m and the rest of x passes by: u' + (1 - m) x.
    """

    def __init__(self, config: DiTConfig, index: int):
        super().__init__()
        width, inner = config.width, round(config.ffn * config.width)
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        promoe = config.design == "promoe" and index % 2 == 1
        self.ffn = (
            promoe_layer(width, inner, config.experts, config.k, index) if promoe else FFN(width, inner)
        )
        self.mask: MoELayer | None = None
        if config.design == "switch_dit":
            self.mask = switch_layer(width, config.experts, config.k, index)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BND: Tensor, cond_BD: Tensor) -> Tensor:
        if self.mask is None:
            return self._block(x_BND, cond_BD)
        mask_BND = self.mask(x_BND)
        return self._block(x_BND * mask_BND, cond_BD) + (1 - mask_BND) * x_BND

    def _block(self, x_BND: Tensor, cond_BD: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(cond_BD))[:, None].chunk(
            6, dim=-1
        )  # [B, 1, D] each
        x_BND = x_BND + gate1 * self._attention(self.norm1(x_BND) * (1 + scale1) + shift1)
        return x_BND + gate2 * self.ffn(self.norm2(x_BND) * (1 + scale2) + shift2)

    def _attention(self, x_BND: Tensor) -> Tensor:
        q, k, v = (
            self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # [B, heads, N, d]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class DiT(nn.Module):
    """From noisy images, their times and their conditions to what the process predicts.

    1. patches become tokens with fixed two-dimensional positions
    2. time and condition become one vector; a label of -1, or a text marked so, is none
    3. blocks; routers see the time's embedding, the labels and the times
    4. tokens become patches
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, values = config.width, config.channels * config.patch**2
        self.embed = nn.Linear(values, width)
        self.register_buffer("places_ND", grid_places(config.side // config.patch, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.none = nn.Parameter(torch.empty(width))
        self.label = nn.Embedding(config.classes, width) if config.classes else nn.Linear(config.text, width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation, self.head = nn.Linear(width, 2 * width), nn.Linear(width, values)
        for parameter in (self.none, self.label.weight):
            nn.init.normal_(parameter, std=0.02)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x_BCSS: Tensor, time_B: Tensor, label_B: Tensor, text_BX: Tensor | None = None
    ) -> Tensor:
        """[B, C, S, S] -> the same.

        Args:
            x_BCSS: noisy images.
            time_B: in 0..1, 1 is noise.
            label_B: int64 classes, -1 for none; with ``text_BX`` anything from 0 on for a text.
            text_BX: embeddings of texts, where the model is conditioned on these.
        """
        side = self.config.side // self.config.patch
        # (1)
        x_BNP = x_BCSS.unflatten(3, (side, -1)).unflatten(2, (side, -1)).permute(0, 2, 4, 1, 3, 5)
        x_BND = self.embed(x_BNP.flatten(3).flatten(1, 2)) + self.places_ND
        # (2)
        time_BD = self.time(frequencies(time_B))
        given_BD = self.label(label_B.clamp(min=0) if text_BX is None else text_BX)
        cond_BD = time_BD + torch.where(label_B[:, None] < 0, self.none, given_BD)
        # (3)
        sample_T = torch.arange(len(x_BND), device=x_BND.device).repeat_interleave(x_BND.shape[1])
        ctx = Context(sample_T=sample_T, cond_BC=time_BD, label_B=label_B, time_B=time_B)
        with routing_context(ctx):
            for block in self.blocks:
                x_BND = block(x_BND, cond_BD)
        # (4)
        shift, scale = self.modulation(F.silu(cond_BD))[:, None].chunk(2, dim=-1)
        y_BNP = self.head(self.norm(x_BND) * (1 + scale) + shift)
        y = y_BNP.unflatten(2, (self.config.channels, self.config.patch, -1)).unflatten(1, (side, side))
        return y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def frequencies(time_B: Tensor) -> Tensor:
    """[B, F] cosines and sines of 1000 t, as DiT embeds its timesteps."""
    rates = torch.exp(
        -math.log(10_000) * torch.arange(FREQUENCIES // 2, device=time_B.device) / (FREQUENCIES // 2)
    )
    angles = 1000 * time_B[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_places(side: int, width: int) -> Tensor:
    """[side^2, D] fixed positions: sines and cosines of the row in one half, of the column in the other."""
    rates = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D/2]
    rows, columns = one[:, None].expand(-1, side, -1), one[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
