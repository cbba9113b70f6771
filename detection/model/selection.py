"""Language-guided query selection: chooses the image tokens from which the decoder starts.

Shapes: B images, S image tokens, Q queries, L text tokens, D = d_model, N levels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration import DynamicDinoConfig
from .layers import BoxHead, ContrastiveHead
from .pyramid import Pyramid, Text


@dataclass
class Proposals:
    """The selected tokens, not detached: their loss trains the selection."""

    tokens_BQD: Tensor
    logits_BQL: Tensor
    boxes_BQ4: Tensor
    """(cx, cy, w, h) on a 0..1 scale."""


class QuerySelection(nn.Module):
    """Selects the ``num_queries`` image tokens most similar to a text token (arXiv 2303.05499, section 3.2).

    1. every cell proposes a box around itself, with sides of 0.05 * 2^level of the image; padding, and cells
       whose box is not inside (0.01, 0.99), propose none
    2. class logits of every token against the text; the Q tokens with the highest maximum logit are selected
    3. their boxes: the proposal of the cell plus the offset of the box head
    """

    def __init__(self, config: DynamicDinoConfig):
        super().__init__()
        self.num_queries = config.num_queries
        self.output = nn.Linear(config.d_model, config.d_model)
        self.output_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.class_head, self.box_head = ContrastiveHead(config), BoxHead(config)

    def forward(self, pyramid: Pyramid, text: Text) -> Proposals:
        cells_BS4 = cell_boxes(pyramid)
        valid_BS = pyramid.mask_BS & ((cells_BS4 > 0.01) & (cells_BS4 < 0.99)).all(-1)
        tokens_BSD = pyramid.tokens_BSD.masked_fill(~valid_BS[..., None], 0.0)
        tokens_BSD = self.output_norm(self.output(tokens_BSD))
        logits_BSL = self.class_head(tokens_BSD, text.features_BLD, text.mask_BL)
        count = min(self.num_queries, logits_BSL.shape[1])  # small images have fewer tokens than queries
        chosen_BQ1 = logits_BSL.detach().amax(-1).topk(count, dim=1).indices[..., None]

        tokens_BQD = _pick(tokens_BSD, chosen_BQ1)
        cell_logits_BS4 = cells_BS4.logit().masked_fill(~valid_BS[..., None], math.inf)
        boxes_BQ4 = (self.box_head(tokens_BQD) + _pick(cell_logits_BS4, chosen_BQ1)).sigmoid()
        return Proposals(tokens_BQD, _pick(logits_BSL, chosen_BQ1), boxes_BQ4)


def cell_boxes(pyramid: Pyramid) -> Tensor:
    """[B, S, 4] box around each cell, relative to the image without its padding."""
    boxes = []
    device = pyramid.tokens_BSD.device
    dtype = torch.promote_types(pyramid.tokens_BSD.dtype, torch.float32)  # half precision rounds positions
    for level, (height, width) in enumerate(pyramid.shapes):
        ratios_B2 = pyramid.valid_ratios_BN2[:, level].to(dtype)
        y_HW, x_HW = torch.meshgrid(
            torch.arange(height, device=device, dtype=dtype) + 0.5,
            torch.arange(width, device=device, dtype=dtype) + 0.5,
            indexing="ij",
        )
        size_2 = torch.tensor([width, height], device=device, dtype=dtype)
        centre_BS2 = torch.stack([x_HW, y_HW], -1).flatten(0, 1) / (ratios_B2 * size_2)[:, None]
        boxes.append(torch.cat([centre_BS2, torch.full_like(centre_BS2, 0.05 * 2**level)], dim=-1))
    return torch.cat(boxes, dim=1)


def _pick(tokens_BSX: Tensor, index_BQ1: Tensor) -> Tensor:
    return tokens_BSX.gather(1, index_BQ1.expand(-1, -1, tokens_BSX.shape[-1]))
