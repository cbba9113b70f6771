from typing import Any

import pytest
import torch

from unimoe.encoders import build_connector
from unimoe.errors import UserError

CONFIG: dict[str, Any] = {
    "type": "qformer",
    "num_queries": 32,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_size": 64,
}


def build(changes=None) -> Any:
    return build_connector(CONFIG | (changes or {}), 16, 8)


def test_queries_start_normal_with_std_002():
    queries = build({"num_queries": 200}).queries
    assert queries.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(queries.mean().item()) < 0.001


def test_queries_learn_apart():
    """With zeros, as in Uni-MoE's code, all queries would get the same gradient."""
    connector = build()
    connector(torch.randn(2, 10, 16))[0].square().sum().backward()
    assert connector.queries.grad.std(0).max() > 0


def test_self_attention_is_not_causal():
    connector = build().eval()
    features_BSD = torch.randn(1, 10, 16)
    before = connector(features_BSD)[0]
    with torch.no_grad():
        connector.queries[-1].normal_()
    assert not torch.allclose(before[:, 0], connector(features_BSD)[0][:, 0])


def test_cross_attention_in_every_second_layer():
    connector = build({"num_layers": 5, "cross_every": 2})
    assert [layer.cross_attention is not None for layer in connector.layers] == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_positions_beyond_the_length_are_not_seen():
    connector = build().eval()
    features_BSD = torch.randn(2, 10, 16)
    other = features_BSD.clone()
    other[1, 4:] = 100
    lengths_B = torch.tensor([10, 4])
    assert torch.equal(connector(features_BSD, lengths_B)[0], connector(other, lengths_B)[0])
    assert not torch.equal(connector(features_BSD)[0], connector(other)[0])


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="hidden_size 64 is not divisible by num_heads 5"):
        build({"num_heads": 5})
