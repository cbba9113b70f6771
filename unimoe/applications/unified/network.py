"""A transformer of two branches that share attention, for understanding and for drawing (BAGEL, arXiv
2505.14683).

Shapes: B images, C channels, S side, N patches of an image, P values of a patch, W = 2 words of a text,
L tokens, D width, V words in the vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.applications.transformer import (
    FREQUENCIES,
    attend,
    check_sizes,
    frequencies,
    from_patches,
    grid_places,
    to_patches,
)
from unimoe.errors import UserError
from unimoe.moe import MoELayer, TopK, importance_experts

Design = Literal["dense", "moe", "pruned"]
WORDS = ("what", "is", "draw", "any", "yes", "no")
"""The vocabulary, before the names of the classes."""
WHAT, IS, DRAW, ANY, YES, NO = range(len(WORDS))


@dataclass
class UnifiedNetConfig:
    """Sizes of the transformer, and the FFNs of its drawing branch."""

    design: Design = "dense"
    """Design of the drawing branch's FFNs, but for the first and the last: ``dense``; ``moe``, cut in experts
    of equal importance; ``pruned``, the most important units alone, as many as are active in the mixture."""
    patch: int = 4
    """Height and width of a patch, which is one token."""
    width: int = 96
    """Width of a token."""
    depth: int = 4
    """Blocks, at least 3."""
    heads: int = 4
    """Attention heads."""
    inner: int = 288
    """Inner width of a dense FFN."""
    experts: int = 16
    """Experts that ``moe`` cuts an FFN in."""
    k: int = 8
    """Experts that a token visits; ``pruned`` keeps this share of the units."""

    def __post_init__(self) -> None:
        check_sizes("model.unified", self, "patch", "width", "heads", "inner", "experts", multiple=4)
        if self.depth < 3:
            raise UserError(f"model.unified.depth is {self.depth}, expected at least 3")
        if not 1 <= self.k <= self.experts:
            raise UserError(
                f"model.unified.k is {self.k}, expected 1 to model.unified.experts, {self.experts}"
            )
        if self.inner % self.experts:
            raise UserError(
                f"model.unified.inner is {self.inner}, expected a multiple of model.unified.experts, "
                f"{self.experts}"
            )

    @property
    def kept(self) -> int:
        """Inner width that is active in an adapted FFN."""
        return self.inner * self.k // self.experts

    @property
    def adapted(self) -> range:
        """Blocks whose drawing FFN the design changes; the first and the last stay dense."""
        return range(1, self.depth - 1)

    @property
    def losses(self) -> dict[str, float]:
        """Auxiliary losses, name -> coefficient."""
        return {"balance": 0.01} if self.design == "moe" else {}


class SwiGLU(nn.Module):
    """A gated FFN without biases."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(inner, width, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def sparse_ffn(ffn: SwiGLU, config: UnifiedNetConfig, index: int) -> MoELayer:
    """An FFN as experts of equal importance (SparseUnifiedModel, arXiv 2512.02351): the sum of the k whose
    logits are largest, each times 1 + its logit. With k = experts and logits of zero it is the FFN."""
    router = TopK(config.width, config.experts, config.k, renormalize=False, score="logits", init_std=1e-4)
    return MoELayer(router, importance_experts([ffn], config.experts), "one_plus", layer_index=index)


class Branch(nn.Module):
    """One branch's own weights of a block."""

    def __init__(self, config: UnifiedNetConfig, ffn: nn.Module):
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.ffn = ffn


class Block(nn.Module):
    """Attention among the tokens of both branches, each projected by its own; then each branch's own FFN."""

    def __init__(self, config: UnifiedNetConfig, index: int):
        super().__init__()
        self.heads = config.heads
        self.understand = Branch(config, SwiGLU(config.width, config.inner))
        pruned = config.design == "pruned" and index in config.adapted
        ffn: nn.Module = SwiGLU(config.width, config.kept if pruned else config.inner)
        if config.design == "moe" and index in config.adapted:
            ffn = sparse_ffn(ffn, config, index)  # type: ignore[arg-type]
        self.draw = Branch(config, ffn)

    def forward(self, parts: list[Tensor], branches: list[str], mask_LL: Tensor) -> list[Tensor]:
        """Tokens [B, L_i, D] of each part, which belongs to a branch; the mask is over all of them."""
        chosen: list[Any] = [getattr(self, name) for name in branches]
        qkv = torch.cat([one.qkv(one.norm1(x)) for one, x in zip(chosen, parts, strict=True)], dim=1)
        mixed = attend(qkv, self.heads, mask_LL).split([x.shape[1] for x in parts], dim=1)
        parts = [x + one.out(y) for one, x, y in zip(chosen, parts, mixed, strict=True)]
        return [x + one.ffn(one.norm2(x)) for one, x in zip(chosen, parts, strict=True)]


class UnifiedNet(nn.Module):
    """Answers a question of two words about an image, and predicts the velocity of a noisy image for a text.

    1. words and clean patches are tokens of the branch that understands, noisy patches of the one that draws
    2. blocks; a word sees what is before it, patches of an image see one another and what is before them
    3. the last word's token gives the answer, noisy patches give their velocity
    """

    def __init__(self, config: UnifiedNetConfig, channels: int, side: int, classes: int):
        """
        Args:
            config: sizes.
            channels: of an image.
            side: height and width of an image.
            classes: of images.

        Raises:
            UserError: the patch does not divide the side.
        """
        super().__init__()
        if side % config.patch:
            raise UserError(f"model.unified.patch is {config.patch}, expected a divisor of data.side, {side}")
        self.config, self.channels, self.side, self.classes = config, channels, side, classes
        width, values = config.width, channels * config.patch**2
        self.words = nn.Embedding(len(WORDS) + classes, width)
        self.see, self.embed = nn.Linear(values, width), nn.Linear(values, width)
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("places_ND", grid_places(side // config.patch, width), persistent=False)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.answer_norm, self.draw_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.answer_head, self.draw_head = nn.Linear(width, len(WORDS) + classes), nn.Linear(width, values)
        nn.init.zeros_(self.draw_head.weight)
        nn.init.zeros_(self.draw_head.bias)

    def answer(self, images: Tensor, text_BW: Tensor) -> Tensor:
        """[B, C, S, S] in -1..1 and int64 words [B, 2] -> logits [B, V]."""
        # (1)
        seen_BND = self.see(to_patches(images, self.config.patch)) + self.places_ND
        words_BWD = self.words(text_BW)
        # (2)
        mask_LL = visible(torch.tensor([0] * seen_BND.shape[1] + [1, 2], device=images.device))
        parts = [torch.cat([seen_BND, words_BWD], dim=1)]
        for block in self.blocks:
            parts = block(parts, ["understand"], mask_LL)
        # (3)
        return self.answer_head(self.answer_norm(parts[0][:, -1]))

    def velocity(self, x_BCSS: Tensor, time_B: Tensor, text_BW: Tensor) -> Tensor:
        """Noisy images [B, C, S, S], their times in 0..1 (1 is noise), and words [B, 2] -> [B, C, S, S]."""
        # (1)
        noisy_BND = self.embed(to_patches(x_BCSS, self.config.patch)) + self.places_ND
        noisy_BND = noisy_BND + self.time(frequencies(time_B))[:, None]
        # (2)
        mask_LL = visible(torch.tensor([0, 1] + [2] * noisy_BND.shape[1], device=x_BCSS.device))
        parts = [self.words(text_BW), noisy_BND]
        for block in self.blocks:
            parts = block(parts, ["understand", "draw"], mask_LL)
        # (3)
        return from_patches(self.draw_head(self.draw_norm(parts[1])), self.config.patch)

    def drawing(self) -> dict[str, nn.Parameter]:
        """The parameters of the drawing branch, by name; answers do not depend on them."""
        own = ("embed.", "time.", "draw_")
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(own) or ".draw." in name
        }

    @staticmethod
    def of(network: dict[str, Any]) -> "UnifiedNet":
        """Build the network from the content of ``config.json``."""
        (channels, side), classes = network["data"]["shape"], network["data"]["classes"]
        return UnifiedNet(UnifiedNetConfig(**network["unified"]), channels, side, len(classes))


def visible(order_L: Tensor) -> Tensor:
    """[L, L] bool, whether the token of a row sees that of a column: one of the same or an earlier place."""
    return order_L[None] <= order_L[:, None]


def class_word(label_B: Tensor) -> Tensor:
    """[B] words of classes; ``any`` for -1."""
    return torch.where(label_B < 0, ANY, label_B + len(WORDS))


def prompts(label_B: Tensor) -> Tensor:
    """[B, 2] texts to draw images of classes; -1 for any."""
    return torch.stack([torch.full_like(label_B, DRAW), class_word(label_B)], dim=1)


def questions(label_B: Tensor, other_B: Tensor, open_B: Tensor) -> tuple[Tensor, Tensor]:
    """Texts [B, 2] and their answers [B].

    Args:
        label_B: classes of the images.
        other_B: classes that are asked about.
        open_B: bool, whether the question is open ("what", answered by the class) or closed ("is it
            ``other_B``", answered by "yes" or "no").
    """
    first_B = torch.where(open_B, WHAT, IS)
    second_B = torch.where(open_B, ANY, class_word(other_B))
    closed_B = torch.where(label_B == other_B, YES, NO)
    return torch.stack([first_B, second_B], dim=1), torch.where(open_B, class_word(label_B), closed_B)


def answer_loss(logits_BV: Tensor, answer_B: Tensor) -> Tensor:
    """[B] cross-entropy."""
    return F.cross_entropy(logits_BV, answer_B, reduction="none")
