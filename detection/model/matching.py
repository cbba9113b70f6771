"""Assigns queries to objects at minimum cost (DETR, arXiv 2005.12872, section 3.1).

Shapes: N layers, B images, Q queries, L text tokens, C names of a prompt, M objects of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from .output import Target


@dataclass
class MatchingCost:
    """Weights of the three terms of the cost, as in Open-GroundingDino."""

    class_weight: float = 1.0
    """Weight of the focal cost, averaged over the tokens of a name."""
    l1_weight: float = 5.0
    """Weight of the L1 distance of (cx, cy, w, h)."""
    giou_weight: float = 2.0
    """Weight of the negative GIoU."""
    alpha: float = 0.25
    """Focal cost: weight of positives; negatives have 1 - alpha."""
    gamma: float = 2.0
    """Focal cost: focusing parameter, which down-weights easy tokens."""


@torch.no_grad()
def match(
    logits_NBQL: Tensor,
    boxes_NBQ4: Tensor,
    targets: Sequence[Target],
    name_tokens: Sequence[Tensor],
    cost: MatchingCost,
) -> Tensor:
    """[N, B, Q] int64: index of the object that each query is assigned to, -1 for none.

    Every layer is matched independently; each object gets one query as long as there are enough of them.
    ``name_tokens[b]`` is [C, L].

    Raises:
        ValueError: a cost is not finite, because training diverged.
    """
    costs = [
        _cost(logits_NBQL[:, b], boxes_NBQ4[:, b], target, tokens_CL, cost)
        for b, (target, tokens_CL) in enumerate(zip(targets, name_tokens, strict=True))
    ]
    flat = torch.cat([cost_NQM.flatten() for cost_NQM in costs]).cpu()  # one transfer from the device
    if not flat.isfinite().all():
        raise ValueError("logits or boxes are not finite numbers: the training diverged")
    object_NBQ = torch.full(boxes_NBQ4.shape[:3], -1)
    parts = flat.split([cost_NQM.numel() for cost_NQM in costs])
    for b, (part, cost_NQM) in enumerate(zip(parts, costs, strict=True)):
        for layer, cost_QM in enumerate(part.view(cost_NQM.shape).numpy()):
            query, found = linear_sum_assignment(cost_QM)
            object_NBQ[layer, b, query] = torch.from_numpy(found)
    return object_NBQ.to(boxes_NBQ4.device)


def _cost(
    logits_NQL: Tensor, boxes_NQ4: Tensor, target: Target, tokens_CL: Tensor, cost: MatchingCost
) -> Tensor:
    """[N, Q, M]"""
    tokens_ML = tokens_CL[target.names_M].to(logits_NQL.dtype)
    tokens_ML = tokens_ML / tokens_ML.sum(dim=1, keepdim=True).clamp(min=1)
    x_NQL = logits_NQL.masked_fill(logits_NQL.isneginf(), 0.0)  # padding, where no name has a token
    p_NQL = x_NQL.sigmoid()
    yes_NQL = cost.alpha * (1 - p_NQL) ** cost.gamma * F.softplus(-x_NQL)
    no_NQL = (1 - cost.alpha) * p_NQL**cost.gamma * F.softplus(x_NQL)
    class_NQM = (yes_NQL - no_NQL) @ tokens_ML.T
    boxes_X4 = boxes_NQ4.flatten(end_dim=1)
    l1_XM = torch.cdist(boxes_X4, target.boxes_M4, p=1)
    giou_XM = generalized_box_iou(
        box_convert(boxes_X4, "cxcywh", "xyxy"), box_convert(target.boxes_M4, "cxcywh", "xyxy")
    )
    box_XM = cost.l1_weight * l1_XM - cost.giou_weight * giou_XM
    return cost.class_weight * class_NQM + box_XM.view_as(class_NQM)
