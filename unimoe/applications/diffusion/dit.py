"""A diffusion transformer with adaLN-Zero (DiT, arXiv 2212.09748), whose FFNs may be a mixture of experts.

Shapes: B images, C channels, S side, N patches of an image, P values of a patch, D width, T = B N tokens,
F size of the time's embedding, X size of a text embedding.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.applications.transformer import (
    FFN,
    FREQUENCIES,
    attend,
    check_sizes,
    frequencies,
    from_patches,
    grid_places,
    to_patches,
)
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
OWN_SIZES: dict[Design, tuple[float, int, int]] = {
    "dense": (4.0, 0, 0),
    "promoe": (4.0, 12, 1),
    "switch_dit": (3.0, 3, 2),
}
"""Design -> ffn, experts and k, where the settings leave them open."""


@dataclass
class DiTConfig:
    """Sizes of a diffusion transformer that the data do not dictate."""

    patch: int = 4
    """Height and width of a patch, which is one token."""
    width: int = 128
    """Width of a token."""
    depth: int = 6
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    ffn: float | None = None
    """Inner width of an FFN over the width of a token; of all experts that a token visits together. By
    default 4, and 3 for ``switch_dit``: then all designs have the same number of
    active parameters."""
    design: Design = "promoe"
    """``dense``; ``promoe`` (every other block's FFN, from the second); ``switch_dit`` (a mask of every
    block)."""
    experts: int | None = None
    """Routed experts of an MoE layer; by default the design's own, 12 of ProMoE and 3 of Switch-DiT."""
    k: int | None = None
    """Routed experts that a token (ProMoE) or a sample (Switch-DiT) visits; by default 1 and 2."""

    def __post_init__(self) -> None:
        check_sizes("model.dit", self, "patch", "width", "depth", "heads", multiple=4)

    def resolved(self) -> "DiTConfig":
        """The same sizes, with the design's own values where none are given.

        Raises:
            UserError: more experts are to be visited than there are, or none.
        """
        ffn, experts, k = (
            own if given is None else given
            for given, own in zip((self.ffn, self.experts, self.k), OWN_SIZES[self.design], strict=True)
        )
        if self.design != "dense" and not 1 <= k <= experts:
            raise UserError(f"model.dit.k is {k}, expected 1 to {experts}, the number of experts")
        return replace(self, ffn=ffn, experts=experts, k=k)

    @property
    def losses(self) -> dict[str, float]:
        """Auxiliary losses of the design, name -> coefficient (``configs/moe/NAME.yaml``)."""
        if self.design == "dense":
            return {}
        return MoEConfig.from_dict({"preset": self.design}).coefficients


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
        assert config.ffn is not None and config.experts is not None and config.k is not None
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
        return self.out(attend(self.qkv(x_BND), self.heads))


class DiT(nn.Module):
    """Predicts what the process asks for, from noisy images, their times and their conditions.

    1. patches become tokens with fixed two-dimensional positions
    2. time and condition become one vector; a label of -1, or a text marked so, is none
    3. blocks; routers see the time's embedding, the labels and the times
    4. tokens become patches
    """

    def __init__(self, config: DiTConfig, channels: int, side: int, classes: int = 0, text: int = 0):
        """
        Args:
            config: the sizes of the network.
            channels: of an image.
            side: height and width of an image, in pixels or latents.
            classes: labels; 0 where the condition is a text.
            text: size of the text embeddings that are the condition; 0 where it is a class.

        Raises:
            UserError: the patch does not divide the side, or k is out of range.
            ValueError: the condition is neither or both.
        """
        super().__init__()
        if side % config.patch:
            raise UserError(
                f"model.dit.patch is {config.patch}, expected a divisor of the images' side, {side}"
            )
        if bool(classes) == bool(text):
            raise ValueError(f"the condition is a class or a text, found {classes} classes and text {text}")
        self.config = config = config.resolved()
        self.channels, self.side, self.text = channels, side, text
        width, values = config.width, channels * config.patch**2
        self.embed = nn.Linear(values, width)
        self.register_buffer("places_ND", grid_places(side // config.patch, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.null_embedding = nn.Parameter(torch.empty(width))
        self.label = nn.Embedding(classes, width) if classes else nn.Linear(text, width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation, self.head = nn.Linear(width, 2 * width), nn.Linear(width, values)
        for parameter in (self.null_embedding, self.label.weight):
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
        # (1)
        x_BND = self.embed(to_patches(x_BCSS, self.config.patch)) + self.places_ND
        # (2)
        time_BD = self.time(frequencies(time_B))
        given_BD = self.label(label_B.clamp(min=0) if text_BX is None else text_BX)
        cond_BD = time_BD + torch.where(label_B[:, None] < 0, self.null_embedding, given_BD)
        # (3)
        sample_T = torch.arange(len(x_BND), device=x_BND.device).repeat_interleave(x_BND.shape[1])
        ctx = Context(sample_T=sample_T, cond_BC=time_BD, label_B=label_B, time_B=time_B)
        with routing_context(ctx):
            for block in self.blocks:
                x_BND = block(x_BND, cond_BD)
        # (4)
        shift, scale = self.modulation(F.silu(cond_BD))[:, None].chunk(2, dim=-1)
        y_BNP = self.head(self.norm(x_BND) * (1 + scale) + shift)
        return from_patches(y_BNP, self.config.patch)

    @staticmethod
    def of(network: dict[str, Any]) -> "DiT":
        """Build the network from the content of ``config.json``."""
        (channels, side), text = network["data"]["shape"], network["data"]["text"]
        classes = 0 if text else len(network["data"]["classes"])
        return DiT(DiTConfig(**network["dit"]), channels, side, classes, text)
