from typing import Any

import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Context, RouterDescription, TopK


def route(router, x):
    return router(x, Context())


def test_topk_softmax_is_a_softmax_over_the_kept_logits():
    router, x = TopK(8, 4, 2, init_std=1.0), torch.randn(5, 8)
    routing = route(router, x)
    logits = x @ router.weight.t()
    torch.testing.assert_close(routing.logits_TE, logits)
    for token in range(5):
        mine = routing.token_N == token
        kept, index = logits[token].topk(2)
        assert set(routing.expert_N[mine].tolist()) == set(index.tolist())
        torch.testing.assert_close(routing.weight_N[mine].sort().values, kept.softmax(0).sort().values)


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_topk_keeps_probabilities(renormalize):
    router, x = TopK(8, 4, 2, "softmax_topk", renormalize, init_std=1.0), torch.randn(5, 8)
    routing = route(router, x)
    sums = torch.zeros(5).index_add(0, routing.token_N, routing.weight_N)
    top = routing.probs_TE.topk(2).values.sum(1)
    torch.testing.assert_close(sums, torch.ones(5) if renormalize else top)


def test_renormalised_orders_agree():
    """softmax over the kept logits = probabilities of all divided by their kept sum."""
    a, b = TopK(8, 4, 2, "topk_softmax"), TopK(8, 4, 2, "softmax_topk", True)
    b.load_state_dict(a.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(route(a, x).weight_N, route(b, x).weight_N)


def test_logits_are_float32_in_a_half_precision_model_and_under_autocast():
    router, x = TopK(8, 4, 2).bfloat16(), torch.randn(5, 8, dtype=torch.bfloat16)
    assert route(router, x).logits_TE.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = route(TopK(8, 4, 2), x)
    assert routing.logits_TE.dtype == routing.weight_N.dtype == torch.float32


def test_top_1_weight_is_exactly_one():
    assert (route(TopK(8, 4, 1), torch.randn(100, 8)).weight_N == 1).all()


def test_gradient_reaches_the_router():
    router: Any = TopK(8, 4, 2)
    routing = route(router, torch.randn(5, 8))
    (routing.weight_N * torch.randn(10)).sum().backward()
    assert router.weight.grad.abs().sum() > 0


def test_saved_name_and_meta_device():
    with torch.device("meta"):
        router = TopK(8, 4, 2)
    assert list(router.state_dict()) == ["weight"] and router.weight.is_meta
    router.to_empty(device="cpu").reset_parameters()
    assert 0 < router.weight.std() < 0.1


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="moe.router.k is 5, expected 1..4"):
        TopK(8, 4, 5)
    with pytest.raises(UserError, match="gating is 'sigmoid'"):
        TopK(8, 4, 2, gating="sigmoid")  # type: ignore[arg-type]


def test_it_describes_itself():
    assert TopK(8, 4, 2).describe() == RouterDescription(4, 2, fixed=True)
