"""Which query answers for which object: the assignment of least cost (DETR, arXiv 2005.12872, section 3.1).

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
    """Weights of the three parts of the cost, as in Open-GroundingDino."""

    class_weight: float = 1.0
    """The focal cost of a name's tokens, averaged over them."""
    l1_weight: float = 5.0
    """Distance of (cx, cy, w, h)."""
    giou_weight: float = 2.0
    """Minus the GIoU."""
    alpha: float = 0.25
    """Focal cost: weight of a yes; a no has 1 - alpha."""
    gamma: float = 2.0
    """Focal cost: how much less a token counts that is right already."""


@torch.no_grad()
def match(
    logits_NBQL: Tensor,
    boxes_NBQ4: Tensor,
    targets: Sequence[Target],
    name_tokens: Sequence[Tensor],
    cost: MatchingCost,
) -> Tensor:
    """[N, B, Q] int64: the object of its image that each query got, -1 for none.

    Every layer is matched by itself; each object gets one query while there are enough of them.
    ``name_tokens[b]`` is [C, L]. Raises ValueError when a cost is not finite, that is, when the model
    diverged.
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
