"""Shapes: B images, Q queries, S keys, L text tokens, D = 32."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from unimoe.detection import DynamicDinoConfig
from unimoe.detection.model.layers import MLP, Attention, ContrastiveHead, sine_position


@pytest.fixture
def config() -> DynamicDinoConfig:
    return DynamicDinoConfig(d_model=32, num_heads=4)


def test_attention_is_that_of_torch(config):
    ours, theirs = Attention(config), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        for part in ("weight", "bias"):
            whole = torch.cat([getattr(one, part) for one in (ours.query, ours.key, ours.value)])
            getattr(theirs, f"in_proj_{part}").copy_(whole)
            getattr(theirs.out_proj, part).copy_(getattr(ours.out_proj, part))
    query_BQD, key_BSD, value_BSD = torch.randn(2, 3, 32), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    mask_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    expected, _ = theirs(query_BQD, key_BSD, value_BSD, key_padding_mask=~mask_BS)
    assert_close(ours(query_BQD, key_BSD, value_BSD, mask_BS[:, None, None]), expected, atol=1e-6, rtol=1e-5)


def test_no_relu_follows_the_last_layer_of_an_mlp():
    """-relu(x) - relu(-x) = -|x|"""
    mlp = MLP(1, 2, 1, depth=2)
    with torch.no_grad():
        mlp.layers[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        mlp.layers[1].weight.copy_(torch.tensor([[-1.0, -1.0]]))
        for layer in mlp.layers:
            layer.bias.zero_()
    assert mlp(torch.tensor([[-2.0], [0.0], [3.0]])).tolist() == [[-2.0], [0.0], [-3.0]]


def test_class_logits_are_dot_products(config):
    """Scaled by 1/sqrt(32) and with a bias where the configuration says so; padding is -inf."""
    query_BQD, text_BLD = torch.zeros(1, 2, 32), torch.zeros(1, 3, 32)
    query_BQD[0, 0], text_BLD[0, 1:] = 0.5, 1.0
    mask_BL = torch.tensor([[True, True, False]])
    plain = ContrastiveHead(DynamicDinoConfig(d_model=32, num_heads=4, scaled_logits=False))
    assert plain(query_BQD, text_BLD, mask_BL).tolist() == [[[0.0, 16.0, -math.inf], [0.0, 0.0, -math.inf]]]
    scaled = ContrastiveHead(config)
    nn.init.constant_(scaled.bias, -1.0)
    found = scaled(query_BQD, text_BLD, mask_BL)
    assert_close(found[0, :, :2], torch.tensor([[-1.0, 16 / math.sqrt(32) - 1], [-1.0, -1.0]]))


def test_every_class_is_improbable_at_the_start(config):
    head = ContrastiveHead(config)
    head.reset_parameters()
    found = head(torch.zeros(1, 1, 32), torch.zeros(1, 1, 32), torch.ones(1, 1, dtype=torch.bool))
    assert found.sigmoid().item() == pytest.approx(0.01)


def test_sine_positions_by_hand():
    """A quarter of the way is sin(pi/2) and cos(pi/2); of two coordinates y comes first."""
    assert_close(sine_position(torch.tensor([0.25]), 2), torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    found = sine_position(torch.tensor([0.25, 0.5]), 2)
    assert_close(found, torch.tensor([0.0, -1.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    box = sine_position(torch.tensor([0.25, 0.5, 0.75, 1.0]), 2).view(4, 2)
    assert_close(box, torch.tensor([[0.0, -1], [1, 0], [-1, 0], [0, 1]]), atol=1e-6, rtol=0)  # y, x, w, h
    slow = sine_position(torch.tensor([25.0]), 4)[2:]  # the second frequency is 100 times lower
    assert_close(slow, torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
