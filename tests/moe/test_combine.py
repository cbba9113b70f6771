import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Pairs, Routing, combine_dense, combine_weights
from unimoe.moe.combine import COMBINE


def routing():
    weight = torch.tensor([[0.7, 0.3], [0.6, 0.4]], requires_grad=True)
    return weight, Routing.from_topk(
        torch.tensor([[0, 1], [1, 2]]), weight, torch.zeros(2, 3), torch.zeros(2, 3), 3
    )


def test_values():
    _, one = routing()
    assert torch.equal(combine_weights("weight", one), one.weight_N)
    torch.testing.assert_close(combine_weights("k_weight", one), 2 * one.weight_N)
    assert torch.equal(combine_weights("indicator", one), torch.ones(4))
    assert torch.equal(combine_weights("straight_through", one), torch.ones(4))


def ragged_routing() -> Routing:
    pairs = Pairs(
        torch.tensor([0, 1, 0]),
        torch.tensor([0, 0, 1]),
        torch.tensor([0.5, 1.0, 0.5]),
        torch.tensor([0, 2, 3]),
    )
    return Routing.from_pairs(pairs, torch.zeros(2, 2), torch.zeros(2, 2))


def test_k_is_counted_per_token_when_routing_is_ragged():
    ragged = ragged_routing()
    assert combine_weights("k_weight", ragged).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mode", COMBINE)
@pytest.mark.parametrize("make", [lambda: routing()[1], ragged_routing])
def test_dense_factors_are_those_of_the_pairs(mode, make):
    one = make()
    expected = torch.zeros(one.num_tokens, one.num_experts)
    expected[one.token_N, one.expert_N] = combine_weights(mode, one)
    assert torch.equal(combine_dense(mode, one), expected)


def test_gradients():
    weight, one = routing()
    assert not combine_weights("indicator", one).requires_grad
    (combine_weights("straight_through", one) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_unknown_mode():
    with pytest.raises(UserError, match="moe.combine: unknown 'mean' .known: weight, "):
        combine_weights("mean", routing()[1])
