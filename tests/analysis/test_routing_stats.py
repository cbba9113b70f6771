"""Load and pathways counted over records that are made by hand, and over those of a tiny model."""

import numpy as np
import pytest
import torch

from unimoe.analysis.routing_stats import ANSWER, RoutingStats
from unimoe.moe import Context, LayerRecord, Pairs, Routing


def one(layer, index_TK, weight_TK, ctx):
    logits_TE = torch.zeros(len(index_TK), 3)
    routing = Routing.from_topk(torch.tensor(index_TK), torch.tensor(weight_TK), logits_TE, logits_TE, 3)
    return LayerRecord(layer, routing, ctx)


@pytest.fixture
def records():
    """Text, picture, picture, padding; two layers."""
    ctx = Context(pad_T=torch.tensor([False, False, False, True]), modality_T=torch.tensor([0, 1, 1, 0]))
    return [
        one(0, [[0, 1], [2, 1], [1, 2], [0, 1]], [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]], ctx),
        one(2, [[1, 0], [2, 0], [0, 2], [0, 1]], [[0.8, 0.2], [0.9, 0.1], [0.7, 0.3], [0.5, 0.5]], ctx),
    ]


def test_load_leaves_out_padding_and_tells_modalities_apart(records):
    stats = RoutingStats()
    stats.add(records)
    load = stats.expert_load()
    assert load["layers"] == [0, 2]
    assert load["text"] == [[0.5, 0.5, 0], [0.5, 0.5, 0]]
    assert load["image"] == [[0, 0.5, 0.5], [0.5, 0, 0.5]]
    assert load["all"][0] == [0.1667, 0.5, 0.3333]
    assert stats.tokens() == {"text": 1, "image": 2}
    assert stats.mean_expert_load()["image"] == [0.25, 0.25, 0.5]


def test_a_pathway_follows_the_largest_weight(records):
    stats = RoutingStats()
    stats.add(records)
    found = stats.pathways()
    assert found["text"] == {"tokens": 1, "distinct": 1, "top": [{"experts": [0, 1], "share": 1.0}]}
    assert {tuple(path["experts"]) for path in found["image"]["top"]} == {(2, 2), (2, 0)}
    flow = np.array(stats.flow()["image"])
    assert flow.shape == (1, 3, 3)
    assert flow[0, 2].tolist() == [0.5, 0, 0.5] and flow.sum() == 1


def test_passes_add_up_and_may_be_given_a_kind_of_their_own(records):
    stats = RoutingStats()
    stats.add([*records, *records])
    stats.add(records, ANSWER)
    assert stats.tokens() == {"text": 2, "image": 4, "answer": 3}
    assert stats.kinds == ["text", "image", "answer"]
    assert stats.expert_load()["image"] == [[0, 0.5, 0.5], [0.5, 0, 0.5]]


def test_a_token_without_an_expert_is_led_by_none():
    pairs = Pairs(torch.tensor([1]), torch.tensor([2]), torch.ones(1), torch.tensor([0, 0, 0, 1]))
    routing = Routing.from_pairs(pairs, torch.zeros(2, 3), torch.zeros(2, 3))
    stats = RoutingStats()
    stats.add([LayerRecord(0, routing, Context()), LayerRecord(1, routing, Context())])
    assert {tuple(path["experts"]) for path in stats.pathways()["text"]["top"]} == {(-1, -1), (2, 2)}
    assert np.array(stats.flow()["text"]).sum() == 0.5


def test_nothing_counted_is_nothing():
    stats = RoutingStats()
    stats.add([])
    assert stats.expert_load() == stats.pathways() == stats.tokens() == {}
