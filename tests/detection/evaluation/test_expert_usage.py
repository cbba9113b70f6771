"""Twins at the start, and counts by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.detection.data.datamodule import eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.expert_usage import ExpertUsage, measure_expert_usage
from unimoe.detection.evaluation.expert_usage import _pairs as pairs
from unimoe.detection.inference.onnx import export_onnx
from unimoe.detection.model.build import build_detector
from unimoe.detection.model.moe_tuning import moe_tuning
from unimoe.errors import UserError


def test_at_the_start_every_expert_has_its_twin_only(settings, world):
    model, tokenizer = build_detector(**settings["model"]["detector"])
    moe_tuning(model, copies=2, slices=2).eval()
    data = read_detection(world / "train.json")
    use = measure_expert_usage(model, tokenizer, data, eval_dataloader(data, model, batch_size=3))
    assert_close(use.load_LE.sum(1), torch.ones(2))
    assert_close(use.partners_L, torch.ones(2))
    assert_close(use.twins_L, torch.ones(2))
    assert use.together_LEE.sum() == 2 * 2 * 8 * 12  # layers, both directions, pictures, queries
    assert len(use.to_json()["pairs"]) == 2 and len(use.to_json()["pairs"][0]) == 4


def test_merged_experts_are_counted_and_not_exported(settings, world, tmp_path):
    model, tokenizer = build_detector(**settings["model"]["detector"])
    compress(moe_tuning(model, copies=2, slices=2).eval(), Plan(merge=[[0, 0, 1, 0], [0, 1, 2, 1]]))
    data = read_detection(world / "train.json")
    use = measure_expert_usage(model, tokenizer, data, eval_dataloader(data, model, chosen=[0]))
    assert use.load_LE.shape == (2, 4) and not use.load_LE[0, 2:].any() and not use.load_LE[1, 3:].any()
    assert_close(use.load_LE.sum(1), torch.ones(2))
    assert use.twins_L.tolist() == [0, 0]  # merged experts are no slices of a copy
    with pytest.raises(UserError, match="the experts are merged"):
        export_onnx(model, tokenizer, ["cat"], tmp_path / "a.onnx")


def test_counts_by_hand():
    together = torch.tensor([[[0.0, 2, 2, 0], [2, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0]]])
    use = ExpertUsage(torch.full((1, 4), 0.25), together, [], [], [], slices=2)
    assert_close(use.partners_L, torch.tensor([(2.0 + 1 + 1) / 3]))  # the unused expert does not count
    assert_close(use.twins_L, torch.tensor([0.5]))


def test_which_pair_finds_which_class():
    members = torch.tensor([[1.0, 1, 0, 0]] * 3 + [[0.0, 0, 1, 1]] * 3 + [[1.0, 0, 1, 0]])
    table, bits = pairs(members, torch.tensor([0, 0, 0, 1, 1, 1, -1]), 3)
    assert table == [(0, 1), (2, 3), None]
    assert math.isclose(bits, 1.0, abs_tol=1e-5)
    assert pairs(members, torch.full((7,), -1), 2) == ([None, None], 0.0)
