"""Shapes: B images, Q = 3 queries, L = 4 text tokens, D = 32, N = 2 levels."""

import pytest
import torch
from torch.testing import assert_close

from unimoe.detection import DynamicDinoConfig
from unimoe.detection.model.decoder import Decoder, feed_forward
from unimoe.detection.model.layers import FFN
from unimoe.detection.model.pyramid import Pyramid, Text
from unimoe.errors import UserError
from unimoe.moe import MoELayer

SMALL = {"d_model": 32, "ffn_dim": 24, "num_heads": 4, "decoder_layers": 2, "num_feature_levels": 2}
SCENE = torch.Generator().manual_seed(3)
X_BQD, BOXES_BQ4 = torch.randn(1, 3, 32, generator=SCENE), torch.rand(1, 3, 4, generator=SCENE) * 0.4 + 0.3
PYRAMID = Pyramid.of([torch.randn(1, 32, size, size, generator=SCENE) for size in (4, 2)], None)
ALL = torch.ones(1, 4, dtype=torch.bool)
TEXT = Text(torch.randn(1, 4, 32, generator=SCENE), ALL, ALL[:, None] & ALL[..., None], torch.arange(4)[None])


def decoder(**settings) -> Decoder:
    module = Decoder(DynamicDinoConfig(**SMALL, **settings))
    for head in [*module.box_heads, *module.class_heads]:
        head.reset_parameters()
    return module.eval()


def test_experts_together_are_as_wide_as_the_dense_ffn():
    old = {"num_experts": 6, "top_k": 3, "placement": [1]}  # as 0.1 saved it
    config = DynamicDinoConfig(**SMALL, moe=old)
    first, second = (feed_forward(config, layer) for layer in range(2))
    assert isinstance(first, FFN) and first.up_proj.weight.shape == (24, 32)
    assert isinstance(second, MoELayer) and second.layer_index == 1
    assert second.experts.down_proj.shape == (6, 32, 8)  # 3 of 6 experts, a third of the width each
    with pytest.raises(UserError, match=r"moe.experts.slices is 5, expected a divisor of ffn_dim \(24\)"):
        feed_forward(DynamicDinoConfig(**SMALL, moe={"experts": {"slices": 5}, "placement": [1]}), 1)


def test_box_heads_at_the_start_keep_the_boxes():
    logits, boxes, references = decoder()(X_BQD, BOXES_BQ4, PYRAMID, TEXT)
    assert logits.shape == (2, 1, 3, 4)
    for found in (*boxes, *references):
        assert_close(found, BOXES_BQ4)


def test_each_layer_starts_from_the_box_that_the_one_before_refined():
    """A step of one logit in the width, in every layer, from a box that is cut off from the graph."""
    module = decoder()
    module.box_heads[0].layers[-1].bias.data[2] = 1.0
    _, boxes, references = module(X_BQD, BOXES_BQ4, PYRAMID, TEXT)
    wide = torch.tensor([0.0, 0.0, 1.0, 0.0])
    once, twice = ((BOXES_BQ4.logit() + steps * wide).sigmoid() for steps in (1, 2))
    assert_close(references, torch.stack([BOXES_BQ4, once]))
    assert_close(boxes, torch.stack([once, twice]))
    assert boxes.requires_grad and not references.requires_grad


def test_heads_are_shared_or_one_for_each_layer():
    assert len(decoder().box_heads) == len(decoder().class_heads) == 1
    apart = decoder(share_box_head=False, share_class_bias=False)
    apart.box_heads[1].layers[-1].bias.data[0] = 1.0
    apart.class_heads[1].bias.data += 5.0
    logits, boxes, _ = apart(X_BQD, BOXES_BQ4, PYRAMID, TEXT)
    assert_close(boxes[0], BOXES_BQ4)
    assert (boxes[1, ..., 0] > BOXES_BQ4[..., 0]).all() and logits[1].mean() - logits[0].mean() > 3


def test_a_query_sees_only_the_queries_that_its_mask_shows():
    """Query 0 sees itself, queries 1 and 2 see all: a change of query 1 reaches 2, and not 0."""
    mask = torch.tensor([[True, False, False], [True, True, True], [True, True, True]])
    module, other = decoder(), X_BQD.clone()
    other[0, 1] += 1
    with torch.no_grad():
        first, second = (module(x, BOXES_BQ4, PYRAMID, TEXT, mask[None, None])[0] for x in (X_BQD, other))
    assert_close(first[:, :, 0], second[:, :, 0])
    assert (first[:, :, 2] - second[:, :, 2]).abs().max() > 1e-3
