from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from unimoe.applications.transformer import (
    FFN,
    Block,
    attend,
    check_sizes,
    from_patches,
    grid_places,
    to_patches,
)
from unimoe.errors import UserError


def test_attention_is_a_softmax_over_all_tokens():
    q, k, v = torch.randn(3, 2, 5, 8)
    found = attend(torch.cat([q, k, v], dim=-1), heads=2)
    for head in (slice(0, 4), slice(4, 8)):
        weight = (q[..., head] @ k[..., head].mT / 2).softmax(dim=-1)
        assert_close(found[..., head], weight @ v[..., head])


def test_every_place_of_a_grid_is_another():
    places = grid_places(3, 8)
    assert places.shape == (9, 8) and (torch.cdist(places, places) + 9 * torch.eye(9)).min() > 0.1
    assert_close(places[0, :4], places[2, :4])  # the row
    assert_close(places[0, 4:], places[6, 4:])  # the column


def test_an_ffn_is_two_layers():
    ffn, x = FFN(4, 6), torch.randn(2, 4)
    assert_close(ffn(x), ffn.down_proj(torch.nn.functional.gelu(ffn.up_proj(x))))


def test_a_block_adds_attention_and_an_ffn():
    block, x = Block(8, 2, lambda: FFN(8, 6), qkv_bias=False), torch.randn(2, 5, 8)
    after = x + block.out(attend(block.qkv(block.norm1(x)), 2))
    assert_close(block(x), after + block.ffn(block.norm2(after)))
    assert block.qkv.bias is None and Block(8, 2, torch.nn.Identity).qkv.bias is not None


def test_sizes_are_checked():
    check_sizes("model.a", SimpleNamespace(width=8, heads=2, depth=1), "width", "heads", "depth", multiple=4)
    for wrong, message in (
        ({"depth": 0}, "model.a.depth is 0, expected at least 1"),
        ({"heads": 3}, "model.a.width is 8, expected a multiple of model.a.heads, 3"),
        ({"width": 6}, "model.a.width is 6, expected a multiple of 4"),
    ):
        config = SimpleNamespace(**{"width": 8, "heads": 2, "depth": 1, **wrong})
        with pytest.raises(UserError, match=message):
            check_sizes("model.a", config, "width", "heads", "depth", multiple=4)


def test_a_mask_hides_tokens():
    qkv, mask = torch.randn(1, 3, 12), torch.ones(3, 3, dtype=torch.bool).tril()
    found = attend(qkv, 2, mask)
    assert_close(found[:, :1], qkv[:, :1, 8:])
    assert_close(found[:, :2], attend(qkv[:, :2], 2, mask[:2, :2]))


def test_patches_are_squares():
    x = torch.randn(2, 3, 6, 6)
    patches = to_patches(x, 2)
    assert patches.shape == (2, 9, 12) and patches[0, 5].equal(x[0, :, 2:4, 4:].flatten())
    assert from_patches(patches, 2).equal(x)
