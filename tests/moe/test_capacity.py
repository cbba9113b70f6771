import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, MoELayer, Routing, SwiGLUExperts, TopK, record
from unimoe.moe.capacity import limit
from unimoe.moe.parts import CAPACITY, Place


def collapsed(tokens: int = 8) -> Routing:
    """Every token at expert 0 of 2, with rising weights."""
    logits = torch.zeros(tokens, 2)
    weight = torch.linspace(0.1, 0.8, tokens)[:, None]
    return Routing.from_topk(torch.zeros(tokens, 1, dtype=torch.int64), weight, logits, logits.softmax(-1), 2)


def drop(kind: str, factor: float = 1.0):
    return CAPACITY.build({"kind": kind, "factor": factor}, Place(8, 2))


def test_an_expert_takes_at_most_the_factor_of_the_mean():
    routing = collapsed()
    first, probable = drop("first")(routing), drop("probability")(routing)
    assert first.token_N.tolist() == [0, 1, 2, 3] and first.offsets_E1.tolist() == [0, 4, 4]
    assert probable.token_N.tolist() == [4, 5, 6, 7]
    torch.testing.assert_close(probable.weight_N, routing.weight_N[4:])
    assert routing.extra["dropped_N"].tolist() == [True] * 4 + [False] * 4
    assert len(drop("first", 1.26)(routing).token_N) == 6


def test_a_factor_that_leaves_room_changes_nothing():
    torch.manual_seed(0)
    routing = TopK(8, 4, 2)(torch.randn(20, 8), None)
    kept = limit(routing, 4.0, torch.rand(40))
    for name in ("token_N", "expert_N", "weight_N", "offsets_E1"):
        assert torch.equal(getattr(kept, name), getattr(routing, name))


def test_random_keeps_every_position_equally_often():
    torch.manual_seed(0)
    kept = torch.zeros(8)
    for _ in range(2000):
        kept[drop("random")(collapsed()).token_N] += 1
    expected = 1000.0
    assert float(((kept - expected) ** 2 / (expected / 2)).sum()) < 24.3  # chi square, 7 degrees, p = 0.001


def test_a_layer_drops_in_training_only_and_records_the_whole_routing():
    torch.manual_seed(0)
    layer = MoELayer(TopK(8, 2, 1), SwiGLUExperts(2, 8, 8), capacity=drop("first", 0.5))
    x = torch.randn(8, 8)
    with record() as records:
        trained = layer.train()(x)
        evaluated = layer.eval()(x)
    assert [len(one.routing.token_N) for one in records] == [8, 8]
    assert int((trained == 0).all(1).sum()) >= 4 and not (evaluated == 0).all(1).any()
    assert int(records[0].routing.extra["dropped_N"].sum()) >= 4


def test_mistakes():
    with pytest.raises(UserError, match="moe.capacity: unknown 'last'"):
        MoEConfig(capacity={"kind": "last"})
