"""Shapes: N layers, B images, Q queries, L text tokens."""

import math

import pytest
import torch

from unimoe.detection import Target
from unimoe.detection.model.matching import MatchingCost, match

LEFT, RIGHT = [0.25, 0.5, 0.2, 0.2], [0.75, 0.5, 0.2, 0.2]
TOKENS_CL = torch.tensor([[1, 0, 0], [0, 1, 1]]).bool()  # the second name has two tokens


def target(*objects: tuple[list[float], int]) -> Target:
    return Target(torch.tensor([box for box, _ in objects]), torch.tensor([name for _, name in objects]))


def test_classes_and_boxes_are_weighed():
    """By their classes the queries find the objects in order, by their boxes the other way round."""
    logits = torch.tensor([[[[3.0, -3, -3], [-3, 3, 3]]]])
    boxes = torch.tensor([[[RIGHT, LEFT]]])
    targets = [target((LEFT, 0), (RIGHT, 1))]
    by_class = match(logits, boxes, targets, [TOKENS_CL], MatchingCost(1.0, 0.0, 0.0))
    assert by_class.tolist() == [[[0, 1]]]
    for cost in (MatchingCost(0.0, 5.0, 0.0), MatchingCost(0.0, 0.0, 2.0)):
        assert match(logits, boxes, targets, [TOKENS_CL], cost).tolist() == [[[1, 0]]]


def test_a_name_costs_the_mean_of_its_tokens():
    """Query 0 is right about one of two tokens, query 1 nearly about both: a sum would say the same, but
    padding, at -inf, must not."""
    logits = torch.tensor([[[[0.0, 4.0, -4.0, -math.inf], [0.0, 2.0, 2.0, -math.inf]]]])
    tokens = [torch.tensor([[0, 1, 1, 0]]).bool()]
    found = match(logits, torch.tensor([[[LEFT, LEFT]]]), [target((LEFT, 0))], tokens, MatchingCost())
    assert found.tolist() == [[[-1, 0]]]


def test_every_layer_and_every_image_is_matched_by_itself():
    logits = torch.zeros(2, 2, 2, 3)
    boxes = torch.tensor([[[LEFT, RIGHT]] * 2, [[RIGHT, LEFT]] * 2])
    nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    found = match(logits, boxes, [target((RIGHT, 0)), nothing], [TOKENS_CL] * 2, MatchingCost())
    assert found.tolist() == [[[-1, 0], [-1, -1]], [[0, -1], [-1, -1]]]


def test_more_objects_than_queries():
    """Each query gets one of its own; the object without a query is the one that fits worst."""
    targets = [target((LEFT, 0), ([0.5, 0.5, 0.9, 0.9], 0), (RIGHT, 0))]
    found = match(
        torch.zeros(1, 1, 2, 3), torch.tensor([[[RIGHT, LEFT]]]), targets, [TOKENS_CL], MatchingCost()
    )
    assert found.tolist() == [[[2, 0]]]


def test_a_model_that_diverged_is_named():
    broken = torch.tensor([[[LEFT, [math.nan, 0.5, 0.2, 0.2]]]])
    with pytest.raises(ValueError, match="diverged"):
        match(torch.zeros(1, 1, 2, 3), broken, [target((LEFT, 0))], [TOKENS_CL], MatchingCost())
