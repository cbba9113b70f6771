import pytest
import torch
from torch.testing import assert_close

from unimoe.errors import UserError
from unimoe.moe import Context, TopK, UncertainRouter

D, E = 16, 4


def router(**settings) -> UncertainRouter:
    torch.manual_seed(0)
    return UncertainRouter(D, E, 2, init_std=1.0, **settings).double()


def tokens() -> torch.Tensor:
    return torch.randn(9, D, dtype=torch.float64)


@pytest.mark.parametrize(("drop", "training"), [(0.0, True), (0.3, False)])
def test_exact_without_dropout_it_is_top_k(drop, training):
    x_TD, found = tokens(), router(drop=drop).train(training)
    plain = TopK(D, E, 2).double()
    plain.weight = found.weight
    routing, wanted = found(x_TD, Context()), plain(x_TD, Context())
    assert_close(routing.dense(), wanted.dense(), rtol=0, atol=1e-9)
    assert_close(routing.probs_TE, wanted.probs_TE, rtol=0, atol=1e-9)


def test_exact_what_the_passes_say_is_the_papers_formula():
    """By covariances of single tokens, from passes with the same masks."""
    found, x_TD = router(drop=0.3, passes=6, ridge=0.01), tokens()
    probs_TE = (x_TD @ found.weight.T).softmax(dim=-1)
    torch.manual_seed(1)
    sure_TE = found.certainty(x_TD, probs_TE)
    assert_close(sure_TE.norm(dim=-1), torch.ones(9, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.manual_seed(1)
    mask_MD = (torch.rand(6, D) >= 0.3).double() / 0.7
    for token, (x_D, probs_E) in enumerate(zip(x_TD, probs_TE, strict=True)):
        passes_ME = ((x_D * mask_MD) @ found.weight.T).softmax(dim=-1)
        ridge_EE = 0.01 * torch.eye(E, dtype=torch.float64)
        apart_E = torch.linalg.inv(passes_ME.T.cov() + ridge_EE) @ (probs_E - passes_ME.mean(dim=0))
        assert_close(sure_TE[token], apart_E / apart_E.norm(), rtol=0, atol=1e-9)


def test_what_the_passes_say_weights_the_probabilities_in_training():
    found, x_TD = router(drop=0.3), tokens()
    torch.manual_seed(1)
    routing = found(x_TD, Context())
    torch.manual_seed(1)
    choice_TE = routing.probs_TE * (1 + found.certainty(x_TD, routing.probs_TE))
    kept_TE = choice_TE * (choice_TE >= choice_TE.topk(2).values[:, 1:])
    assert_close(routing.dense(), kept_TE / kept_TE.sum(dim=1, keepdim=True))
    routing.dense().square().sum().backward()
    assert found.weight.grad is not None and found.weight.grad.isfinite().all()


def test_a_token_of_zeros_has_no_spread():
    routing = router(drop=0.3)(torch.zeros(2, D, dtype=torch.float64), Context())
    assert routing.dense().isfinite().all()
    assert_close(routing.dense().sum(dim=1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [{"passes": 1}, {"drop": 1.0}, {"ridge": 0.0}])
def test_mistakes_are_errors(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"moe.router.{name} is {value}, expected"):
        router(**wrong)
