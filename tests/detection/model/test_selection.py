"""Shapes: B images, S cells, Q queries, L = 2 text tokens, D = 32."""

import math

import pytest
import torch
from torch.testing import assert_close

from unimoe.detection import DynamicDinoConfig
from unimoe.detection.model.pyramid import Pyramid, Text
from unimoe.detection.model.selection import QuerySelection, cell_boxes

D = 32


def pyramid_of(*shapes: tuple[int, int], mask: torch.Tensor | None = None) -> Pyramid:
    return Pyramid.of([torch.zeros(1, D, *shape) for shape in shapes], mask)


def test_each_cell_has_a_box_around_its_centre():
    found = cell_boxes(pyramid_of((2, 2), (1, 1)))
    fine = [[x, y, 0.05, 0.05] for y in (0.25, 0.75) for x in (0.25, 0.75)]
    assert_close(found, torch.tensor([[*fine, [0.5, 0.5, 0.1, 0.1]]]))


def test_boxes_are_relative_to_the_image_without_its_padding():
    """The left half of 8 x 8 pixels is image: columns 0 and 1 of 4 lie at a quarter and three quarters."""
    mask = torch.ones(1, 8, 8, dtype=torch.int64)
    mask[:, :, 4:] = 0
    found = cell_boxes(pyramid_of((1, 4), mask=mask))
    assert_close(found[0, :, 0], torch.tensor([0.25, 0.75, 1.25, 1.75]))
    assert_close(found[0, :, 1], torch.full((4,), 0.5))


@pytest.fixture
def selection() -> QuerySelection:
    """Two queries; tokens go through unchanged but for their norm, boxes are the cells' own."""
    module = QuerySelection(DynamicDinoConfig(d_model=D, num_heads=4, num_queries=2, scaled_logits=False))
    with torch.no_grad():
        module.output.weight.copy_(torch.eye(D))
        module.output.bias.zero_()
    module.box_head.reset_parameters()
    return module


@pytest.fixture
def text() -> Text:
    """Two tokens, along the first two channels; the third is padding that everything is like."""
    features_BLD = torch.zeros(1, 3, D)
    features_BLD[0, 0, 0] = features_BLD[0, 1, 1] = 1
    features_BLD[0, 2] = 100
    mask_BL = torch.tensor([[True, True, False]])
    return Text(features_BLD, mask_BL, mask_BL[:, None] & mask_BL[..., None], torch.zeros(1, 3).long())


def test_the_cells_most_like_any_token_are_chosen_best_first(selection, text):
    pyramid = pyramid_of((2, 2))
    tokens_BSD = pyramid.tokens_BSD.clone()
    tokens_BSD[0, 1, 0] = tokens_BSD[0, 2, 1] = 1  # cell 1 is like the first token, cell 2 like the second,
    tokens_BSD[0, 1, 5] = 1  # but not as purely
    found = selection(pyramid.with_tokens(tokens_BSD), text)
    assert_close(found.boxes_BQ4[0, :, :2], torch.tensor([[0.25, 0.75], [0.75, 0.25]]))
    assert found.logits_BQL[0].argmax(dim=-1).tolist() == [1, 0]
    assert found.logits_BQL[0, :, 2].tolist() == [-math.inf] * 2
    assert found.tokens_BQD.requires_grad and found.boxes_BQ4.requires_grad, "their loss trains the selection"


def test_padding_proposes_nothing(selection, text):
    """The two right columns are padding; however well they fit, the two cells of the image are chosen."""
    mask = torch.ones(1, 4, 8, dtype=torch.int64)
    mask[:, :, 4:] = 0
    pyramid = pyramid_of((1, 4), mask=mask)
    tokens_BSD = torch.zeros(1, 4, D)
    tokens_BSD[0, 2:, 0] = 1
    tokens_BSD[0, :2, 1] = 0.5
    found = selection(pyramid.with_tokens(tokens_BSD), text)
    assert sorted(found.boxes_BQ4[0, :, 0].tolist()) == pytest.approx([0.25, 0.75])


def test_a_small_image_has_as_many_queries_as_cells(selection, text):
    assert selection(pyramid_of((1, 1)), text).boxes_BQ4.tolist() == [[pytest.approx([0.5, 0.5, 0.05, 0.05])]]
