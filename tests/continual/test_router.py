import pytest
import torch
import torch.nn.functional as F

from unimoe.continual.guidance import GuidanceConfig, Guide, assignment
from unimoe.continual.router import CosineTopK, SoftmaxRouter
from unimoe.errors import UserError
from unimoe.moe import Context


def cosine(banks=2, **settings):
    router = CosineTopK(8, **{"k": 3, "temperature": 0.1, **settings})
    for _ in range(banks):
        router.add_rows(4)
    return router


@pytest.mark.parametrize("banks", [1, 2])
def test_the_nearest_rows_are_kept(banks):
    """Against cosines and a softmax in float64, token by token."""
    router, x = cosine(banks, scale=0.5), torch.randn(20, 8)
    routing = router(x, Context())
    rows = F.normalize(torch.cat(list(router.rows)).double(), dim=-1)
    for token, row in zip(F.normalize(x.double(), dim=-1), routing.dense(), strict=True):
        scores = 0.5 * rows @ token
        best = scores.argsort(descending=True)[:3]
        expected = torch.zeros(4 * banks, dtype=torch.float64)
        expected[best] = (scores[best] / 0.1).softmax(-1)
        torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(routing.probs_TE.sum(-1), torch.ones(20))
    assert routing.num_experts == 4 * banks == router.num_experts
    assert (routing.offsets_E1[-1], len(routing.token_N)) == (60, 60)


def test_more_kept_than_there_are():
    dense_TE = cosine(1, k=16)(torch.randn(5, 8), Context()).dense()
    assert dense_TE.shape == (5, 4) and bool((dense_TE > 0).all())


def test_the_scores_of_old_rows_do_not_depend_on_new_ones():
    router, x = CosineTopK(100, k=2), torch.randn(30, 100)
    router.add_rows(5)
    before = router.scores(x)
    router.rows[0].requires_grad_(False)
    for _ in range(2):
        router.add_rows(4)
        assert torch.equal(router.scores(x)[:, :5], before)
        router.rows[-1].requires_grad_(False)


def test_gradients_are_those_of_one_product():
    """For the tokens and the rows that train; frozen rows get none."""
    router, x = cosine(3, scale=0.5), torch.randn(20, 8, requires_grad=True)
    router.rows[0].requires_grad_(False)
    leaves, dy = [x, *router.rows[1:]], torch.randn(20, 12)
    found = torch.autograd.grad(router.scores(x), leaves, dy)
    rows = F.normalize(torch.cat(list(router.rows)), dim=-1)
    expected = torch.autograd.grad(0.5 * F.normalize(x, dim=-1) @ rows.T, leaves, dy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    router.scores(x).sum().backward()
    assert router.rows[0].grad is None


def test_a_token_of_zeros_is_near_nothing():
    x = torch.zeros(1, 8, requires_grad=True)
    scores = cosine().scores(x)
    scores.sum().backward()
    assert scores.abs().max() == 0 and x.grad.isfinite().all()


def test_masked_experts_get_no_weight():
    guide = Guide(GuidanceConfig())
    router, x = cosine(guide=guide), torch.randn(50, 8)
    guide.guided = True
    routing = router(x, Context())
    allowed_TE = assignment(routing.logits_TE, 4, guide.config)
    assert not allowed_TE.all() and bool((routing.dense()[~allowed_TE] == 0).all())
    torch.testing.assert_close(routing.dense().sum(-1), torch.ones(50))


def test_a_softmax_over_all():
    router, x = SoftmaxRouter(8, 4), torch.randn(6, 8)
    routing = router(x, Context())
    torch.testing.assert_close(routing.dense(), (x @ router.weight.T).softmax(-1))
    assert len(routing.token_N) == 24


def test_how_many_experts_a_token_visits():
    assert [cosine(banks).describe().experts_per_token for banks in (1, 2)] == [3, 3]
    few = cosine(1, k=16).describe()
    assert (few.num_experts, few.experts_per_token, few.fixed) == (4, 4, True)
    dense = SoftmaxRouter(8, 4).describe()
    assert (dense.num_experts, dense.experts_per_token, dense.fixed) == (4, 4, True)


def test_settings():
    for settings in ({"k": 0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match="expected both above 0"):
            CosineTopK(8, **settings)
