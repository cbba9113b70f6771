"""Contrastive denoising (DINO, arXiv 2203.03605, section 3.3): extra queries that start near the objects.

Shapes: B images, D denoising queries, L text tokens, C names of a prompt, M objects of an image, G groups, Q
other queries, T = D + Q.

Each group has two queries for every object: a positive one, shifted a little, which must find it, and a
negative one, shifted further, which must be rejected. DINO embeds the (noised) class of a query by a table;
here its embedding is the mean of the text features of the name, which works for any vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert

from .criterion import Denoising
from .output import Target


@dataclass
class DenoisingConfig:
    queries: int = 100
    """Approximate number for the image with the most objects; 0 disables denoising."""
    label_noise: float = 0.5
    """Half of this fraction of the queries get a random class, as in the code of DINO."""
    box_noise: float = 1.0
    """Maximum shift of each side of a positive box, in half widths and heights; negative boxes are shifted by
    one to two times that."""


@dataclass
class DenoisingQueries:
    """Inputs of the decoder."""

    boxes_BD4: Tensor
    """(cx, cy, w, h), noised."""
    tokens_BDL: Tensor
    """Weights over the text tokens, the mean over the tokens of a name; zeros on padding."""
    group_D: Tensor
    """int64."""
    labels: Denoising
    """Targets for the criterion."""

    def visible(self, queries: int) -> Tensor:
        """[B, 1, T, T] bool: groups do not attend to one another, and the other queries not to them."""
        real_BD = self.labels.object_BD >= 0
        same_BDD = (self.group_D[:, None] == self.group_D) & real_BD[:, None]
        batch, count = real_BD.shape
        visible_BTT = torch.ones(
            batch, count + queries, count + queries, dtype=torch.bool, device=real_BD.device
        )
        visible_BTT[:, :count, :count] = same_BDD
        visible_BTT[:, count:, :count] = False
        return visible_BTT[:, None]


def make_denoising(
    targets: Sequence[Target], name_tokens: Sequence[Tensor], config: DenoisingConfig
) -> DenoisingQueries | None:
    """Draw the queries of a batch, on the device of the targets; None if no image has objects.

    ``name_tokens[b]`` is [C, L], where L is the longest prompt of the batch.
    """
    most = max(len(target.names_M) for target in targets)
    if most == 0 or config.queries == 0:
        return None
    groups = max(1, config.queries // (2 * most))
    images = [_noised(*pair, groups, most, config) for pair in zip(targets, name_tokens, strict=True)]
    boxes_BD4, tokens_BDL, object_BD = (torch.stack(column) for column in zip(*images, strict=True))
    device = boxes_BD4.device
    positive_D = (torch.arange(2, device=device) == 0).repeat_interleave(most).repeat(groups)
    return DenoisingQueries(
        boxes_BD4,
        tokens_BDL,
        torch.arange(groups, device=device).repeat_interleave(2 * most),
        Denoising(object_BD, positive_D.expand(len(targets), -1)),
    )


def _noised(
    target: Target,
    tokens_CL: Tensor,
    groups: int,
    most: int,
    config: DenoisingConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """(boxes [D, 4], tokens [D, L], object [D]) of one image; D runs over groups, then positive and negative,
    then ``most`` slots for objects."""
    device, count = target.boxes_M4.device, len(target.names_M)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape).to(device)

    corners_M4 = box_convert(target.boxes_M4, "cxcywh", "xyxy")
    half_M4 = target.boxes_M4[:, 2:].repeat(1, 2) / 2
    share_G2M4 = draw(groups, 2, count, 4)
    share_G2M4[:, 1] += 1
    sign_G2M4 = (draw(groups, 2, count, 4) < 0.5).float() * 2 - 1
    corners_G2M4 = (corners_M4 + share_G2M4 * sign_G2M4 * half_M4 * config.box_noise).clamp(0, 1)
    lower, upper = corners_G2M4.unflatten(-1, (2, 2)).unbind(-2)
    corners_G2M4 = torch.cat([torch.minimum(lower, upper), torch.maximum(lower, upper)], dim=-1)
    boxes_G2M4 = box_convert(corners_G2M4, "xyxy", "cxcywh")

    other_G2M = (draw(groups, 2, count) * len(tokens_CL)).long()
    name_G2M = target.names_M.expand(groups, 2, -1)
    name_G2M = torch.where(draw(groups, 2, count) < config.label_noise / 2, other_G2M, name_G2M)
    weights_CL = tokens_CL.float() / tokens_CL.sum(1, keepdim=True).clamp(min=1)

    boxes = torch.full((groups, 2, most, 4), 0.5, device=device)
    tokens = torch.zeros(groups, 2, most, tokens_CL.shape[1], device=device)
    objects = torch.full((groups, 2, most), -1, device=device)
    boxes[:, :, :count], tokens[:, :, :count] = boxes_G2M4, weights_CL.to(device)[name_G2M]
    objects[:, :, :count] = torch.arange(count, device=device)
    return boxes.flatten(0, 2), tokens.flatten(0, 2), objects.flatten()
