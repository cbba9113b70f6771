"""Plots of a tiny model."""

import torch

from unimoe.analysis import plots
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


def test_losses_of_several_runs_are_lines_of_their_own():
    curve = [{"step": step, "train/loss": 5 / (1 + step), "val/loss": 5 / (1 + step)} for step in range(20)]
    one, two = (
        plots.compare_losses({"dense": curve}),
        plots.compare_losses({"dense": curve, "mixtral": curve}),
    )
    assert "mixtral" in two and "mixtral" not in one and two.count("<path") > one.count("<path")
    assert plots.compare_losses({"dense": []})


def test_size_names_each_design_at_its_parameters():
    drawn = plots.against_size({"small": (0.4, -0.2, 0.1), "large": (4.0, 0.1, None)}, "difference")
    assert "small" in drawn and "large" in drawn and plots.BLUE in drawn and plots.ORANGE not in drawn


def test_intervals_apart_from_zero_have_a_colour():
    drawn = plots.intervals({"better": (-0.2, 0.1), "same": (0.1, 0.3), "alone": (0.1, None)}, "difference")
    assert plots.BLUE in drawn and plots.ORANGE not in drawn
    assert plots.ORANGE in plots.intervals({"worse": (0.2, 0.1)}, "difference")
