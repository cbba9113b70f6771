"""Shapes: B images, L = 4 text tokens, D = 32, levels of 5 x 7, 3 x 4 and 2 x 2 cells."""

import pytest
import torch
from torch.testing import assert_close

from unimoe.detection import DynamicDinoConfig
from unimoe.detection.model.enhancer import (
    CrossScaleFusion,
    CSPBlock,
    EdgeEnhancer,
    FullEnhancer,
    text_positions,
)
from unimoe.detection.model.layers import sine_position
from unimoe.detection.model.pyramid import Pyramid, Text

SHAPES = [(5, 7), (3, 4), (2, 2)]  # each the half of the one before, rounded up


def config(**settings) -> DynamicDinoConfig:
    return DynamicDinoConfig(d_model=32, ffn_dim=32, num_heads=4, csp_blocks=1, **settings)


def scene(word: float = 0.0) -> tuple[Pyramid, Text]:
    """Two segments of two tokens; ``word`` is added to the last one."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(1, 32, *shape, generator=generator) for shape in SHAPES]
    features_BLD = torch.randn(1, 4, 32, generator=generator)
    features_BLD[:, 3] += word * torch.randn(32, generator=generator)
    place = torch.arange(4)
    together = (place[:, None] // 2 == place // 2)[None]
    return Pyramid.of(maps, None), Text(
        features_BLD, torch.ones(1, 4, dtype=torch.bool), together, place[None] % 2
    )


def strengthen(module: torch.nn.Module) -> None:
    """Fusion starts at a factor of 1e-4, which would hide what it does."""
    for name, parameter in module.named_parameters():
        if name.endswith(("vision_param", "text_param")):
            parameter.data.fill_(1.0)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", [EdgeEnhancer, FullEnhancer])
def test_text_reaches_every_cell_and_by_them_other_segments(kind, layers):
    """A word of the second segment reaches the first one by way of the image only: from layer two on."""
    module = kind(config(encoder_layers=layers)).eval()
    if kind is FullEnhancer:
        module.reset_parameters()
    strengthen(module)
    with torch.no_grad():
        (image, text), (other_image, other_text) = module(*scene()), module(*scene(word=2.0))
    assert image.shapes == SHAPES and text.features_BLD.shape == (1, 4, 32)
    for level, other in zip(image.maps(), other_image.maps(), strict=True):
        assert (level - other).abs().amax(dim=1).min() > 1e-3, "a cell that no word reaches"
    first, second = (text.features_BLD - other_text.features_BLD).abs().amax(dim=(0, 2)).split(2)
    assert second.min() > 0.1
    assert first.max() < 1e-5 if layers == 1 else first.min() > 1e-3


def test_cross_scale_fusion_keeps_sizes_and_lets_every_level_see_every_other():
    fusion = CrossScaleFusion(config())
    maps = [torch.randn(1, 32, *shape, requires_grad=True) for shape in SHAPES]
    out = fusion(maps)
    assert [tuple(level.shape) for level in out] == [(1, 32, *shape) for shape in SHAPES]
    for level in out:
        gradients = torch.autograd.grad(level.square().sum(), maps, retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_narrow_block_is_widened_again():
    wide, narrow = CSPBlock(config()), CSPBlock(config(csp_expansion=0.5))
    x = torch.randn(1, 64, 3, 3)
    assert wide(x).shape == narrow(x).shape == (1, 32, 3, 3)
    assert isinstance(wide.out, torch.nn.Identity)
    assert_close(wide(x), wide.branch(x) + wide.shortcut(x))
    assert narrow.branch(x).shape[1] == 16


def test_positions_of_text_begin_anew_in_each_segment():
    _, text = scene()
    found = text_positions(text)
    assert_close(found[0, :2], found[0, 2:])
    assert_close(found[0, 1], sine_position(torch.tensor([1.0]), 32))
