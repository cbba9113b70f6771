"""Collectives as the first of three ranks sees them; tests/*/test_ranks.py run real processes."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from unimoe.moe import ExpertLoad
from unimoe.training import ranks


@pytest.fixture
def three_ranks(monkeypatch):
    """The others hold twice and three times what this rank does; this rank is the second."""

    def all_gather_object(parts, found):
        parts[:] = [{"first": 1}, found, {"last": 3, **found}]

    monkeypatch.setattr(ranks, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "get_world_size", lambda: 3)
    monkeypatch.setattr(ranks, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks, "all_reduce", lambda values: values.mul_(1 + 2 + 3))
    monkeypatch.setattr(ranks, "all_gather_object", all_gather_object)


def test_one_process_gets_what_it_gave():
    values, items, found = torch.tensor([1.0, 5.0]), [3, 1], {"a": 1}
    assert ranks.mean_over_ranks(values) is values
    assert ranks.shard_across_ranks(items) is items and ranks.union_over_ranks(found) is found
    assert_close(ranks.rank_weighted(torch.tensor(2.0), 7), torch.tensor(2.0))


def test_means_and_shares(three_ranks):
    values = torch.tensor([1.0, 5.0])
    assert_close(ranks.mean_over_ranks(values), torch.tensor([2.0, 10.0]))
    assert values.tolist() == [1.0, 5.0], "the values themselves stay"
    layers = [ExpertLoad(torch.tensor([4.0, 6.0]), torch.tensor(5.0)), ExpertLoad(torch.tensor([3.0]), 5.0)]
    loads = ranks.expert_load_over_ranks(layers)
    assert [one.tokens_per_expert.tolist() for one in loads] == [[8.0, 12.0], [6.0]]
    assert [float(one.tokens) for one in loads] == [10.0, 10.0]
    assert ranks.shard_across_ranks(list(range(8))) == [1, 4, 7]
    assert ranks.union_over_ranks({"mine": 2}) == {"first": 1, "mine": 2, "last": 3}


def test_a_rank_with_few_items_weighs_little(three_ranks):
    """4 of 4, 8 and 12 items: half of a mean share of 8. Without items on any rank it is no NaN."""
    assert_close(ranks.rank_weighted(torch.tensor(3.0), 4), torch.tensor(1.5))
    assert ranks.rank_weighted(torch.tensor(0.0), 0) == 0.0


def test_ranks_that_share_a_batch_count_as_one():
    plain = SimpleNamespace(world_size=8, global_rank=5, strategy=SimpleNamespace())
    shared = SimpleNamespace(world_size=8, global_rank=5, strategy=SimpleNamespace(ranks_per_batch=2))
    assert (ranks.data_parallel_size(plain), ranks.data_parallel_rank(plain)) == (8, 5)
    assert (ranks.data_parallel_size(shared), ranks.data_parallel_rank(shared)) == (4, 2)


def test_sums_have_the_gradients_of_all_ranks(three_ranks):
    values = torch.tensor([1.0, 5.0], requires_grad=True)
    total = ranks.sum_over_ranks(values)
    assert total.tolist() == [
        6.0,
        30.0,
    ]  # the others hold twice and three times as much, also in the gradient
    (total * torch.tensor([1.0, 2.0])).sum().backward()
    assert values.grad.tolist() == [6.0, 12.0]
