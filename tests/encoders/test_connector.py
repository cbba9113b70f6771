from typing import Any

import pytest
import torch
from torch import nn

from unimoe.encoders import build_connector, num_tokens
from unimoe.errors import UserError

CONFIGS = [
    {"type": "linear"},
    {"type": "mlp"},
    {"type": "mlp", "depth": 3, "hidden_size": 5},
    {"type": "pooled_mlp"},
    {"type": "pooled_mlp", "pool": 3, "depth": 2},
    {"type": "pooled_mlp", "stack": 5},
    {"type": "pooled_mlp", "stack": 4, "depth": 2},
    {"type": "qformer", "num_queries": 7, "num_layers": 2, "num_heads": 2, "hidden_size": 8},
    {
        "type": "qformer",
        "num_queries": 3,
        "num_layers": 2,
        "num_heads": 2,
        "hidden_size": 8,
        "cross_every": 2,
    },
]
every = pytest.mark.parametrize("config", CONFIGS, ids=str)


@every
def test_counts_equal_num_tokens(config):
    connector = build_connector(config, 6, 4)
    for positions in (1, 4, 16, 25):
        tokens_BNH, counts_B = connector(torch.randn(2, positions, 6))
        expected = num_tokens(config, positions)
        assert connector.num_tokens(positions) == expected
        assert tokens_BNH.shape == (2, expected, 4)
        assert counts_B.tolist() == [expected] * 2 and counts_B.dtype == torch.int64


@every
def test_lengths_count_and_batch_mates_do_not_matter(config):
    if config["type"] == "pooled_mlp" and "stack" not in config:
        pytest.skip("images have no lengths")
    connector = build_connector(config, 6, 4).eval()
    lengths = [16, 9, 1]
    features_BSD = torch.randn(3, 16, 6)
    tokens_BNH, counts_B = connector(features_BSD, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        count = num_tokens(config, length)
        assert counts_B[row] == count
        alone, _ = connector(features_BSD[row : row + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(tokens_BNH[row, :count], alone[0], atol=1e-6, rtol=0)


@every
def test_meta_construction_has_no_buffers_to_forget(config):
    with torch.device("meta"):
        connector = build_connector(config, 6, 4)
    assert list(connector.buffers()) == []


def test_mlp_is_llavas_mlp2x_gelu():
    connector: Any = build_connector({"type": "mlp"}, 1024, 4096)
    layers = connector.layers
    assert [type(layer) for layer in layers] == [nn.Linear, nn.GELU, nn.Linear]
    assert [(layers[i].in_features, layers[i].out_features) for i in (0, 2)] == [(1024, 4096), (4096, 4096)]


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_reduces_the_cells_of_the_grid(pooling):
    connector: Any = build_connector({"type": "pooled_mlp", "pooling": pooling}, 3, 3)
    with torch.no_grad():
        connector.last.weight.copy_(torch.eye(3))
        connector.last.bias.zero_()
    features_BSD = torch.randn(2, 16, 3)
    tokens_BNH, _ = connector(features_BSD)
    grid = features_BSD.view(2, 4, 4, 3)
    cells = [grid[:, r : r + 2, c : c + 2].flatten(1, 2) for r in (0, 2) for c in (0, 2)]
    expected = torch.stack([cell.mean(1) if pooling == "mean" else cell.amax(1) for cell in cells], 1)
    torch.testing.assert_close(tokens_BNH, expected)


def test_grid_that_is_not_square_must_be_said():
    features_BSD = torch.randn(1, 12, 6)
    with pytest.raises(UserError, match="12 positions are no 3 x 3 grid"):
        build_connector({"type": "pooled_mlp"}, 6, 4)(features_BSD)
    tokens_BNH, _ = build_connector({"type": "pooled_mlp", "grid": [3, 4]}, 6, 4)(features_BSD)
    assert tokens_BNH.shape == (1, 4, 4)


def test_stacking_pads_with_zeros_at_the_end():
    connector: Any = build_connector({"type": "pooled_mlp", "stack": 5}, 2, 3)
    rows_BNK = connector.gather(torch.arange(14.0).view(1, 7, 2) + 1, torch.tensor([6]))
    assert rows_BNK.tolist() == [[list(range(1, 11)), [11.0, 12.0, *[0.0] * 8]]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"type": "resampler"},
            "unknown connector type 'resampler'; known: linear, mlp, pooled_mlp, qformer",
        ),
        ({"type": "mlp", "size": 3}, "unknown key 'size'"),
        ({"type": "pooled_mlp", "pool": 2, "stack": 5}, "both pool .* and stack"),
        ({"type": "pooled_mlp", "pooling": "median"}, "pooling is 'median', expected mean or max"),
        ({"type": "mlp", "stack": 5}, "pool and stack belong to type pooled_mlp"),
        ({"type": "linear", "depth": 2}, "use type mlp"),
        ({"type": "mlp", "depth": 0}, "depth is 0, expected at least 1"),
    ],
)
def test_bad_settings(config, message):
    with pytest.raises(UserError, match=message):
        build_connector(config, 6, 4)
    with pytest.raises(UserError, match=message):
        num_tokens(config, 6)
