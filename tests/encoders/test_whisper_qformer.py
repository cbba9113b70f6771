from typing import Any

import pytest
import torch
from whisper.model import TextDecoder

from unimoe.encoders import build_connector
from unimoe.encoders.whisper_qformer import load_whisper_decoder
from unimoe.errors import UserError

WIDTH, LAYERS, POSITIONS = 16, 2, 12
CONFIG: dict[str, Any] = {
    "type": "qformer",
    "num_queries": 5,
    "num_layers": LAYERS,
    "num_heads": 2,
    "hidden_size": WIDTH,
    "causal": True,
}


@pytest.fixture
def decoder(tmp_path):
    torch.manual_seed(0)
    decoder = TextDecoder(11, POSITIONS, WIDTH, 2, LAYERS).eval()
    torch.nn.init.normal_(decoder.positional_embedding)
    torch.save({f"decoder.{name}": t for name, t in decoder.state_dict().items()}, tmp_path / "w.pt")
    return decoder, str(tmp_path / "w.pt")


def test_equals_whispers_decoder_fed_with_queries(decoder):
    decoder, weights = decoder
    connector: Any = build_connector(CONFIG, WIDTH, 8).eval()
    queries = connector.queries.detach().clone()
    load_whisper_decoder(connector, weights)
    features = torch.randn(3, 7, WIDTH)
    x = (queries + decoder.positional_embedding[:5]).expand(3, -1, -1)
    for block in decoder.blocks:
        x = block(x, features, mask=decoder.mask)
    expected = connector.proj(decoder.ln(x))
    torch.testing.assert_close(connector(features)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_causal_query_does_not_see_later_ones():
    connector: Any = build_connector(CONFIG, WIDTH, 8).eval()
    features = torch.randn(1, 7, WIDTH)
    before = connector(features)[0]
    with torch.no_grad():
        connector.queries[-1].normal_()
    after = connector(features)[0]
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, "lacks layers.2"),
        ({"hidden_size": 8}, "expected width 8"),
        ({"num_queries": 13}, "13 queries"),
        ({"cross_every": 2}, "cross_every must be 1"),
    ],
)
def test_another_shape_is_an_error(decoder, change, message):
    with pytest.raises(UserError, match=message):
        load_whisper_decoder(build_connector(CONFIG | change, WIDTH, 8), decoder[1])  # type: ignore[arg-type]
