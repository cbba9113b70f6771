import pytest
import torch

from unimoe.analysis.routing_stats import RoutingStats
from unimoe.compress.plan import Plan
from unimoe.compress.records import leave_records
from unimoe.compress.store import compress
from unimoe.compress.view import expert_counts, route, view
from unimoe.moe import record
from unimoe.testing_stock import STOCK


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_stock_mixtures_leave_records(name, families, ids):
    model = families(name)
    leave_records(model)
    leave_records(model)
    before = model(input_ids=ids).logits
    with record() as records:
        assert torch.equal(model(input_ids=ids).logits, before)
    layers = view(model)
    assert [one.layer for one in records] == [layer.layer for layer in layers]
    for one, layer in zip(records, layers, strict=True):
        assert len(one.routing.token_N) == ids.numel() * layer.top_k
        assert one.routing.logits_TE.shape == one.routing.probs_TE.shape == (ids.numel(), layer.num_experts)


@torch.no_grad()
def test_records_show_what_was_skipped_and_layers_may_differ(families, ids):
    model = families("mixtral")
    leave_records(model)
    compress(model, Plan(keep=[[0, 1, 3], [0, 1, 2, 3]]))
    assert expert_counts(model) == {0: 3, 1: 4}
    stats = RoutingStats()
    with record() as records, route(view(model), lambda one, x, index, weight: (
        index.masked_fill(torch.arange(2) == 1, one.num_experts), weight)):  # fmt: skip
        model.set_experts_implementation("unimoe")
        model(input_ids=ids)
    stats.add(records)
    assert stats.experts_per_token(expert_counts(model)) == {0: 1, 1: 1}
    load = stats.expert_load()["all"]
    assert [len(row) for row in load] == [4, 4] and load[0][3] == 0
    assert abs(sum(stats.mean_expert_load()["all"]) - 1) < 1e-3
    assert stats.pathways()["text"]["tokens"] == 18 and len(stats.flow()["text"][0]) == 4
