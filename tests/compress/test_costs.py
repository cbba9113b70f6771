import torch

from unimoe.compress.costs import CODE, PAPER, pmq_cost


def test_shares_and_powers():
    count, weight = torch.tensor([[30, 10]]), torch.tensor([[8.0, 2.0]])
    error = torch.tensor([[[4.0, 2.0], [4.0, 1.0]]])
    found = pmq_cost(count, weight, error, PAPER)
    torch.testing.assert_close(found[0, 0], 0.75 * 0.8**1.5 * torch.tensor([16.0, 4.0]))
    torch.testing.assert_close(found[0, 1], 0.25 * 0.2**1.5 * torch.tensor([16.0, 1.0]))
    torch.testing.assert_close(pmq_cost(count, weight, error), pmq_cost(count, weight, error, CODE))
    assert (found[..., 0] >= found[..., 1]).all()


def test_an_expert_without_tokens_costs_nothing():
    assert pmq_cost(torch.tensor([[0, 4]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, 3))[0, 0].eq(0).all()
