"""Sets of predicted masks against sets of plausible ones: losses, assignment and measures.

Shapes: B images, K predicted masks of an image, G plausible ones, S side, P = S^2 pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
"""IoU from which a mask counts as found, as in COCO's average precision."""
BETA2 = 0.3
"""Beta squared, the weight of recall that is usual for salient objects (Achanta et al., CVPR 2009)."""


def mask_costs(logits_BKSS: Tensor, masks_BGSS: Tensor) -> Tensor:
    """[B, K, G] mean cross-entropy over the pixels plus Dice loss of every pair of masks."""
    logits_BKP, masks_BGP = logits_BKSS.flatten(2), masks_BGSS.flatten(2)
    entropy_BKG = (
        F.softplus(logits_BKP).mean(dim=2)[..., None] - logits_BKP @ masks_BGP.mT / masks_BGP.shape[2]
    )
    probs_BKP = logits_BKP.sigmoid()
    both_BKG = probs_BKP @ masks_BGP.mT
    sizes_BKG = probs_BKP.sum(dim=2)[..., None] + masks_BGP.sum(dim=2)[:, None]
    return entropy_BKG + 1 - (2 * both_BKG + 1) / (sizes_BKG + 1)


def assign(costs_KG: np.ndarray) -> np.ndarray:
    """[K] the plausible mask that each prediction learns from.

    The pairs of an optimal assignment, whose sum of costs is smallest, come first: each plausible mask gets a
    prediction, or, of more masks than predictions (G > K), each prediction a mask of its own. The predictions
    that are left get their cheapest mask.
    """
    target_K = costs_KG.argmin(axis=1)
    predicted, given = linear_sum_assignment(costs_KG)
    target_K[predicted] = given
    return target_K


def set_loss(logits_BKSS: Tensor, masks_BGSS: Tensor, count_B: Tensor) -> Tensor:
    """[B] mean cost of an image's predictions.

    Args:
        logits_BKSS: of the predictions.
        masks_BGSS: float, 0 or 1; behind an image's own masks there may be others.
        count_B: own masks of each image.
    """
    costs_BKG = mask_costs(logits_BKSS, masks_BGSS)
    targets = [
        torch.from_numpy(assign(costs_KG[:, :count]))
        for costs_KG, count in zip(costs_BKG.detach().double().cpu().numpy(), count_B.tolist(), strict=True)
    ]
    target_BK = torch.stack(targets).to(costs_BKG.device)
    return costs_BKG.gather(2, target_BK[..., None])[..., 0].mean(dim=1)


def iou(predicted_KSS: Tensor, masks_GSS: Tensor) -> Tensor:
    """[K, G] intersection over union of bool masks; 0 for two empty ones."""
    predicted_KP, masks_GP = predicted_KSS.flatten(1).double(), masks_GSS.flatten(1).double()
    both_KG = predicted_KP @ masks_GP.T
    either_KG = predicted_KP.sum(dim=1)[:, None] + masks_GP.sum(dim=1) - both_KG
    return both_KG / either_KG.clamp(min=1)


def precision_recall(iou_KG: Tensor) -> tuple[float, float]:
    """Precision and recall of one image, many to many: the share of predictions that some plausible mask
    matches, and of plausible masks that some prediction matches; means over ``THRESHOLDS``."""
    thresholds = iou_KG.new_tensor(THRESHOLDS)
    return tuple(  # type: ignore[return-value]
        float((iou_KG.amax(dim=dim)[:, None] >= thresholds - 1e-9).double().mean()) for dim in (1, 0)
    )


def harmonic_mean(precision: float, recall: float) -> float:
    """F1; 0 where both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def f_beta(predicted_SS: Tensor, mask_SS: Tensor) -> float:
    """F-measure of two bool masks, which counts precision more than recall (``BETA2``)."""
    both = float((predicted_SS & mask_SS).sum())
    if not both:
        return 0.0
    precision, recall = both / float(predicted_SS.sum()), both / float(mask_SS.sum())
    return (1 + BETA2) * precision * recall / (BETA2 * precision + recall)
