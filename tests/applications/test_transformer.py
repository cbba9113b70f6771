import torch
from torch.testing import assert_close

from unimoe.applications.transformer import FFN, attend, from_patches, grid_places, to_patches


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
