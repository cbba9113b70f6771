"""Shapes: B = 2 images, D = 3 channels, levels of 2 x 4 and 1 x 2 cells (S = 10)."""

import pytest
import torch
from torch.testing import assert_close

from unimoe.detection.model.pyramid import Pyramid, level_mask


@pytest.fixture
def maps() -> list[torch.Tensor]:
    return [torch.randn(2, 3, 2, 4), torch.randn(2, 3, 1, 2)]


def test_tokens_are_the_cells_row_by_row_fine_to_coarse(maps):
    pyramid = Pyramid.of(maps, None)
    assert pyramid.tokens_BSD.shape == (2, 10, 3) and pyramid.shapes == [(2, 4), (1, 2)]
    assert_close(pyramid.tokens_BSD[1, 6], maps[0][1, :, 1, 2])  # row 1, column 2 of the finer level
    assert_close(pyramid.tokens_BSD[1, 9], maps[1][1, :, 0, 1])
    for found, level in zip(pyramid.maps(), maps, strict=True):
        assert torch.equal(found, level)
    assert torch.equal(pyramid.with_maps(pyramid.maps()).tokens_BSD, pyramid.tokens_BSD)
    assert pyramid.shapes_N2.tolist() == [[2, 4], [1, 2]]


def test_without_a_mask_everything_is_image(maps):
    pyramid = Pyramid.of(maps, None)
    assert pyramid.mask_BS.all()
    assert_close(pyramid.valid_ratios_BN2, torch.ones(2, 2, 2))


def test_padding_is_masked_at_every_level(maps):
    """Images of 8 x 16 pixels; the second one fills its left half, and 5 of 8 rows, which is one cell of 4
    pixels and a part of the next."""
    mask = torch.ones(2, 8, 16, dtype=torch.int64)
    mask[1, :, 8:], mask[1, 5:] = 0, 0
    pyramid = Pyramid.of(maps, mask)
    fine, coarse = pyramid.masks()
    assert fine[0].all() and coarse[0].all()
    assert fine[1].tolist() == [[True, True, False, False]] * 2
    assert coarse[1].tolist() == [[True, False]]
    assert_close(pyramid.valid_ratios_BN2[1], torch.tensor([[0.5, 1.0], [0.5, 1.0]]))  # (width, height)


def test_a_cell_belongs_to_the_image_by_its_first_pixel():
    mask = torch.tensor([[[1, 1, 1, 1, 1, 0, 0, 0]] * 4])
    assert level_mask(torch.zeros(1, 3, 1, 2), mask).tolist() == [[[True, True]]]
    mask[..., 4] = 0
    assert level_mask(torch.zeros(1, 3, 1, 2), mask).tolist() == [[[True, False]]]
