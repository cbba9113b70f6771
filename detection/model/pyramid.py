"""Intermediate features of an image and its prompt.

Shapes: B images, N levels (fine to coarse), H x W cells of a level, S = cells of all levels, D = d_model, L
text tokens.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Text:
    """The prompt's tokens."""

    features_BLD: Tensor
    mask_BL: Tensor
    """bool, True on real tokens."""
    attention_mask_BLL: Tensor
    """bool, True inside a segment."""
    position_ids_BL: Tensor
    """Position within the segment."""


@dataclass
class Pyramid:
    """Feature maps of several levels, flattened to one sequence of tokens."""

    tokens_BSD: Tensor
    mask_BS: Tensor
    """bool, True on cells of the image, False on its padding."""
    shapes: list[tuple[int, int]]
    """(H, W) of each level."""
    valid_ratios_BN2: Tensor
    """Fraction of the padded width and height that the image covers at each level."""

    @classmethod
    def of(cls, maps: list[Tensor], pixel_mask_BHW: Tensor | None) -> "Pyramid":
        """Make a pyramid of feature maps [B, D, H, W], fine to coarse; without a mask there is no padding."""
        masks = [level_mask(features, pixel_mask_BHW) for features in maps]
        ratios = [torch.stack([m[:, 0].float().mean(1), m[:, :, 0].float().mean(1)], -1) for m in masks]
        return cls(
            torch.cat([features.flatten(2).transpose(1, 2) for features in maps], dim=1),
            torch.cat([mask.flatten(1) for mask in masks], dim=1),
            [(features.shape[2], features.shape[3]) for features in maps],
            torch.stack(ratios, dim=1).to(maps[0].dtype),
        )

    def split(self, tokens_BSX: Tensor) -> list[Tensor]:
        """[B, S, ...] split into levels."""
        return list(tokens_BSX.split([height * width for height, width in self.shapes], dim=1))

    def maps(self) -> list[Tensor]:
        """The levels as [B, D, H, W]."""
        return [
            tokens.transpose(1, 2).unflatten(2, shape)
            for tokens, shape in zip(self.split(self.tokens_BSD), self.shapes, strict=True)
        ]

    def masks(self) -> list[Tensor]:
        """The levels' masks as [B, H, W]."""
        return [
            mask.unflatten(1, shape)
            for mask, shape in zip(self.split(self.mask_BS), self.shapes, strict=True)
        ]

    def with_tokens(self, tokens_BSD: Tensor) -> "Pyramid":
        return replace(self, tokens_BSD=tokens_BSD)

    def with_maps(self, maps: list[Tensor]) -> "Pyramid":
        return self.with_tokens(torch.cat([features.flatten(2).transpose(1, 2) for features in maps], dim=1))

    @property
    def shapes_N2(self) -> Tensor:
        return torch.tensor(self.shapes, device=self.tokens_BSD.device)


def level_mask(features_BDHW: Tensor, pixel_mask_BHW: Tensor | None) -> Tensor:
    """[B, H, W] bool: which cells of a map belong to the image."""
    batch, _, height, width = features_BDHW.shape
    if pixel_mask_BHW is None:
        return torch.ones(batch, height, width, dtype=torch.bool, device=features_BDHW.device)
    return F.interpolate(pixel_mask_BHW[None].float(), size=(height, width))[0].bool()
