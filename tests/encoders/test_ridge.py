from typing import Any

import pytest
import torch

from unimoe.encoders import build_connector, ridge_init, ridge_map
from unimoe.errors import UserError


@pytest.mark.parametrize("count", [200, 12])
def test_recovers_a_planted_map(count):
    """Over- and underdetermined; features of very different scales and offsets."""
    x_nD = torch.randn(count, 20) * torch.logspace(-2, 2, 20) + 5
    weight_HD, bias_H = torch.randn(7, 20), torch.randn(7)
    y_nH = x_nD @ weight_HD.T + bias_H
    found_HD, found_H = ridge_map(x_nD, y_nH, ridge=1e-8)
    torch.testing.assert_close(x_nD.double() @ found_HD.T + found_H, y_nH.double(), atol=1e-3, rtol=1e-4)
    if count > 20:
        torch.testing.assert_close(found_HD.float(), weight_HD, atol=1e-3, rtol=1e-3)


def test_both_forms_agree():
    x_nD, y_nH = torch.randn(15, 15), torch.randn(15, 3)
    wide = torch.cat([x_nD, torch.ones(15, 1)], 1)  # one constant feature more: the n x n form, same solution
    weight_HD, bias_H = ridge_map(x_nD, y_nH, ridge=3.0)
    wide_HD, wide_H = ridge_map(wide, y_nH, ridge=3.0)
    torch.testing.assert_close(wide_HD[:, :-1], weight_HD)
    torch.testing.assert_close(wide_H, bias_H)
    assert not wide_HD[:, -1].any()


def test_strong_ridge_gives_the_mean():
    y_nH = torch.randn(30, 3)
    weight_HD, bias_H = ridge_map(torch.randn(30, 5), y_nH, ridge=1e12)
    assert weight_HD.abs().max() < 1e-6
    torch.testing.assert_close(bias_H.float(), y_nH.mean(0))


CONNECTORS = [
    {"type": "pooled_mlp"},
    {"type": "pooled_mlp", "depth": 2, "hidden_size": 64},
    {"type": "linear"},
]


@pytest.mark.parametrize("config", CONNECTORS, ids=str)
def test_tokens_spread_as_their_targets_do_and_point_at_them(config):
    classes, width = 8, 16
    embeddings = torch.randn(classes, width)
    centres = torch.randn(classes, 32)
    label = torch.arange(160) % classes
    features_nSD = centres[label][:, None] + 0.3 * torch.randn(160, 25, 32)
    connector = build_connector(config, 32, width)
    ridge_init(connector, features_nSD, embeddings[label], ridge=300.0)
    tokens_BNH, _ = connector(features_nSD)
    centre_H = embeddings[label].mean(0)
    spread = (tokens_BNH.mean(1) - centre_H).norm(dim=-1).mean().item()
    assert spread == pytest.approx((embeddings[label] - centre_H).norm(dim=-1).mean().item(), rel=1e-3)
    nearest = torch.cosine_similarity(tokens_BNH.mean(1)[:, None], embeddings[None], dim=-1).argmax(1)
    assert (nearest == label).float().mean() > 0.95
    assert tokens_BNH.requires_grad


def test_speech_padding_does_not_enter():
    config = {"type": "pooled_mlp", "stack": 5}
    features_nSD, lengths_n = torch.randn(40, 23, 6), torch.randint(3, 23, (40,))
    noisy = torch.where(torch.arange(23)[None, :, None] < lengths_n[:, None, None], features_nSD, 99.0)
    targets_nH = torch.randn(40, 4)
    one: Any = build_connector(config, 6, 4)
    two: Any = build_connector(config, 6, 4)
    ridge_init(one, features_nSD, targets_nH, lengths_n)
    ridge_init(two, noisy, targets_nH, lengths_n)
    torch.testing.assert_close(one.last.weight, two.last.weight)


def test_targets_of_parts_are_fitted_token_by_token():
    """Two things side by side: the mean of all tokens could not tell which one is where."""
    embeddings, centres = torch.randn(4, 8), torch.randn(4, 24)
    label_n2 = torch.stack([torch.arange(80) % 4, torch.arange(80) // 4 % 4], 1)
    grid_n44D = centres[label_n2][:, None].repeat(1, 4, 1, 1).repeat_interleave(2, 2)
    connector = build_connector({"type": "pooled_mlp", "pooling": "max"}, 24, 8)
    halves_2N = torch.tensor([[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]])
    parts = torch.arange(80).repeat_interleave(2), halves_2N.repeat(80, 1)
    ridge_init(connector, grid_n44D.flatten(1, 2), embeddings[label_n2.flatten()], ridge=0.1, parts=parts)
    tokens_BNH, _ = connector(grid_n44D.flatten(1, 2))
    for place in (0, 1):
        wanted_nH = embeddings[label_n2[:, place]]
        assert (tokens_BNH[:, [place, place + 2]] - wanted_nH[:, None]).abs().max() < 0.05


def test_errors():
    with pytest.raises(UserError, match=r"\[3, 5\] and \[4, 2\], expected paired rows"):
        ridge_map(torch.randn(3, 5), torch.randn(4, 2))
    qformer = build_connector({"type": "qformer", "num_heads": 1, "hidden_size": 8}, 4, 4)
    with pytest.raises(UserError, match="QFormerConnector has no closed form"):
        ridge_init(qformer, torch.randn(3, 4, 4), torch.randn(3, 4))
