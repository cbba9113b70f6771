"""Sets of masks on images of four pixels, by hand."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from unimoe.applications.saliency.sets import (
    assign,
    f_beta,
    harmonic_mean,
    iou,
    mask_costs,
    precision_recall,
    set_loss,
)


def masks(*rows: str) -> torch.Tensor:
    """[rows, 2, 2] of 0 and 1."""
    return torch.tensor([[float(one) for one in row] for row in rows]).unflatten(1, (2, 2))


LEFT, TOP, ALL, NONE = "1010", "1100", "1111", "0000"


def test_iou():
    found = iou(masks(LEFT, NONE).bool(), masks(LEFT, TOP, ALL, NONE).bool())
    assert_close(found, torch.tensor([[1, 1 / 3, 1 / 2, 0], [0, 0, 0, 0]], dtype=torch.float64))


def test_costs_are_cross_entropy_and_dice():
    logits = masks(LEFT)[None] * 4 - 2
    found = mask_costs(logits, masks(LEFT, NONE)[None])
    p = 1 / (1 + math.exp(-2))  # of the right pixel value
    right = -math.log(p) + 1 - (2 * 2 * p + 1) / (2 * p + 2 * (1 - p) + 2 + 1)
    wrong = (-math.log(p) - math.log(1 - p)) / 2 + 1 - 1 / (2 * p + 2 * (1 - p) + 1)
    assert_close(found, torch.tensor([[[right, wrong]]]))


def test_each_plausible_mask_gets_a_prediction_and_the_rest_their_nearest():
    costs = np.array([[0.1, 0.5], [0.2, 0.9], [0.3, 0.8], [0.4, 0.1]])
    assert assign(costs).tolist() == [0, 0, 0, 1]
    assert assign(costs[:2]).tolist() == [1, 0]  # 0.5 + 0.2 is less than 0.1 + 0.9
    assert assign(costs[:1]).tolist() == [0]


def test_the_loss_ignores_masks_of_other_images_and_reaches_each_prediction():
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    padded = torch.stack([masks(LEFT, NONE), masks(TOP, ALL)])
    loss_B = set_loss(logits, padded, torch.tensor([1, 2]))
    assert_close(loss_B[:1], mask_costs(logits[:1], masks(LEFT)[None]).mean(dim=1)[:, 0])
    loss_B.sum().backward()
    assert (logits.grad.abs().flatten(2).sum(dim=2) > 0).all()


def test_precision_and_recall_of_sets():
    exact_and_half = torch.tensor([[1.0, 0.1], [0.5, 0.2], [0.0, 0.72]], dtype=torch.float64)
    precision, recall = precision_recall(exact_and_half)
    # found at 10, 1 and 5 of the ten thresholds 0.50 to 0.95; of the plausible masks at 10 and 5
    assert precision == pytest.approx((10 + 1 + 5) / 30) and recall == pytest.approx((10 + 5) / 20)
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3) and harmonic_mean(0.0, 0.0) == 0.0
    assert precision_recall(torch.ones(5, 2)) == (1.0, 1.0)  # five predictions may all be one mask


def test_f_beta_weighs_precision():
    left, every, none = masks(LEFT, ALL, NONE).bool()
    assert f_beta(left, left) == 1.0 and f_beta(none, left) == 0.0
    assert f_beta(every, left) == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1))
    assert f_beta(left, every) == pytest.approx(1.3 * 0.5 / (0.3 + 0.5))
