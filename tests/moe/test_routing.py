import pytest
import torch

from unimoe.moe.routing import Pairs, Routing, sort_by_expert


def test_pairs_are_sorted_by_expert_and_keep_their_weight():
    index = torch.tensor([[2, 0], [1, 2], [0, 2]])
    weight = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.9, 0.1]])
    routing = Routing.from_topk(index, weight, torch.zeros(3, 4), torch.zeros(3, 4), 4)
    assert routing.expert_N.tolist() == [0, 0, 1, 2, 2, 2]
    assert routing.token_N.tolist() == [0, 2, 1, 0, 1, 2]
    torch.testing.assert_close(routing.weight_N, torch.tensor([0.3, 0.9, 0.6, 0.7, 0.4, 0.1]))
    assert routing.offsets_E1.tolist() == [0, 2, 3, 6, 6]
    assert (routing.num_tokens, routing.num_experts) == (3, 4)
    assert routing.offsets_E1.dtype == routing.token_N.dtype == torch.int64


def test_offsets_of_random_routing_count_the_pairs():
    index = torch.rand(50, 16).topk(3).indices
    slot, token, expert, offsets = sort_by_expert(index, 16)
    assert torch.equal(offsets.diff(), torch.bincount(index.reshape(-1), minlength=16))
    assert torch.equal(index.reshape(-1)[slot], expert) and torch.equal(slot // 3, token)
    assert torch.equal(slot.sort().values, torch.arange(150))


def test_ids_beyond_the_experts_lie_behind_the_last_offset():
    _, _, expert, offsets = sort_by_expert(torch.tensor([[4, 1], [0, 4], [7, 4]]), 4)
    assert offsets.tolist() == [0, 1, 2, 2, 2] and expert[2:].min() >= 4


def test_no_tokens():
    _, _, _, offsets = sort_by_expert(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert offsets.tolist() == [0, 0, 0, 0]


def test_gradient_reaches_the_weights():
    weight = torch.rand(3, 2, requires_grad=True)
    routing = Routing.from_topk(
        torch.tensor([[2, 0], [1, 2], [0, 2]]), weight, torch.zeros(3, 3), torch.zeros(3, 3), 3
    )
    (routing.weight_N * routing.expert_N).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[2.0, 0.0], [1.0, 2.0], [0.0, 2.0]]))


def views():
    """One choice, built in each way."""
    torch.manual_seed(0)
    weight = torch.rand(6, 4, requires_grad=True)
    index = torch.rand(6, 4).topk(2).indices
    chosen = torch.zeros(6, 4, dtype=torch.bool).scatter(1, index, True)
    zeros = torch.zeros(6, 4)
    topk = Routing.from_topk(index, weight.gather(1, index), zeros, zeros, 4)
    mask = Routing.from_mask(chosen, weight, zeros, zeros)
    return weight, chosen, [topk, mask, Routing.from_pairs(topk.pairs, zeros, zeros)]


@pytest.mark.parametrize("way", [0, 1, 2])
def test_dense_has_the_weights_of_the_pairs_and_zeros_elsewhere(way):
    weight, chosen, built = views()
    routing = built[way]
    assert torch.equal(routing.chosen(), chosen)
    assert torch.equal(routing.dense(), weight * chosen)
    for name in Pairs._fields:
        assert torch.equal(getattr(routing, name), getattr(built[0], name)), name
    factor = torch.rand(6, 4)
    (routing.dense() * factor).sum().backward()
    assert torch.equal(weight.grad, factor * chosen)


def test_the_dense_view_sorts_nothing(monkeypatch):
    """Banks take it in each of hundreds of projections, and exported graphs have no ragged groups."""
    monkeypatch.setattr("unimoe.moe.routing.sort_by_expert", None)
    index, zeros = torch.tensor([[2, 0], [1, 2]]), torch.zeros(2, 3)
    routing = Routing.from_topk(index, torch.tensor([[0.7, 0.3], [0.6, 0.4]]), zeros, zeros, 3)
    torch.testing.assert_close(routing.dense(), torch.tensor([[0.3, 0.0, 0.7], [0.0, 0.6, 0.4]]))
