import torch
from torch.testing import assert_close

from unimoe.applications.transformer import FFN, attend, grid_places


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
