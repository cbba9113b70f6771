"""Plots of a tiny model."""

import torch

from unimoe.analysis.plots import pathways, plot_expert_load
from unimoe.analysis.routing_stats import RoutingStats
from unimoe.moe import record
from unimoe.testing import tiny_model


def test_pictures_of_a_model(tmp_path):
    model, processor = tiny_model(tmp_path, {"num_experts": 4, "top_k": 2, "placement": "all"})
    batch = processor(["hello", "a longer text"])
    stats = RoutingStats()
    with record() as records, torch.no_grad():
        model(**batch)
    stats.add(records)
    assert stats.tokens() == {"text": int(batch["attention_mask"].sum())}
    experts = ["words", "picture", "speech", "more"]
    for columns in (None, 1):
        picture = plot_expert_load(stats.expert_load(), experts, columns)
        assert picture.count("<!-- speech -->") == 2  # the axis of both panels
    assert "<!-- text tokens -->" in pathways(stats.flow(), stats.layers, experts)
