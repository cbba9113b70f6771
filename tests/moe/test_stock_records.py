import pytest
import torch

from unimoe.analysis.routing_stats import RoutingStats
from unimoe.compress.plan import Plan
from unimoe.compress.route import route
from unimoe.compress.store import compress
from unimoe.moe import record
from unimoe.moe.stock_records import leave_records
from unimoe.moe.view import expert_counts, view
from unimoe.testing_stock import STOCK

IDS = torch.randint(1, 59, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_stock_mixtures_leave_records(name):
    model = STOCK[name]().eval()
    leave_records(model)
    leave_records(model)
    before = model(input_ids=IDS).logits
    with record() as records:
        assert torch.equal(model(input_ids=IDS).logits, before)
    layers = view(model)
    assert [one.layer for one in records] == [layer.layer for layer in layers]
    for one, layer in zip(records, layers, strict=True):
        assert len(one.routing.token_N) == IDS.numel() * layer.top_k
        assert one.routing.logits_TE.shape == one.routing.probs_TE.shape == (IDS.numel(), layer.num_experts)


@torch.no_grad()
def test_records_show_what_was_skipped_and_layers_may_differ():
    model = STOCK["mixtral"]().eval()
    leave_records(model)
    compress(model, Plan(keep=[[0, 1, 3], [0, 1, 2, 3]]))
    assert expert_counts(model) == {0: 3, 1: 4}
    stats = RoutingStats()
    with record() as records, route(view(model), lambda one, x, index, weight: (
        index.masked_fill(torch.arange(2) == 1, one.num_experts), weight)):  # fmt: skip
        model.set_experts_implementation("unimoe")
        model(input_ids=IDS)
    stats.add(records)
    assert stats.experts_per_token(expert_counts(model)) == {0: 1, 1: 1}
    load = stats.expert_load()["all"]
    assert [len(row) for row in load] == [4, 4] and load[0][3] == 0
    assert abs(sum(stats.mean_expert_load()["all"]) - 1) < 1e-3
    assert stats.pathways()["text"]["tokens"] == 18 and len(stats.flow()["text"][0]) == 4
