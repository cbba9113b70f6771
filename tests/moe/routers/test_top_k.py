from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import Context, LayerRecord, MoELayer, RouterDescription, TopK, expert_load, slice_experts


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


def dense_ffn(hidden=16, inner=24) -> Any:
    config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=2)
    return LlamaMLP(config).double()


@pytest.mark.parametrize("gating, renormalize", [("topk_softmax", True), ("softmax_topk", False)])
@pytest.mark.parametrize(
    "settings",
    [{"bias": "scores"}, {"groups": 1}, {"groups": 4, "top_groups": 4}, {"groups": "slices"}, {"scale": 1}],
)
def test_exact_neutral_options_choose_as_without_them(settings, gating, renormalize):
    plain = TopK(8, 8, 2, gating, renormalize, init_std=1.0)
    router = TopK(8, 8, 2, gating, renormalize, **settings)
    router.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(40, 8)
    for name in ("expert_N", "token_N", "weight_N", "logits_TE", "probs_TE"):
        assert torch.equal(getattr(route(router, x), name), getattr(route(plain, x), name)), name


@pytest.mark.parametrize("slices, k", [(2, 2), (4, 4), (4, 8)])
def test_exact_one_slice_of_each_position_of_copies_is_the_dense_ffn(slices, k):
    """Free top-k does not hold it: it takes one slice of two copies and another of none."""
    dense, x = dense_ffn(), torch.randn(50, 16, dtype=torch.float64)
    experts = slice_experts(dense, slices, copies=4)
    router = TopK(16, 4 * slices, k, groups="slices", slices=slices, init_std=1.0)
    layer = MoELayer(router, experts, "straight_through")
    torch.testing.assert_close(layer(x), dense(x) * (k // slices), rtol=0, atol=1e-9)
    free = MoELayer(TopK(16, 4 * slices, k, init_std=1.0), experts, "straight_through")
    assert (free(x) - dense(x) * (k // slices)).abs().max() > 1e-3


def test_a_bias_changes_the_choice_and_not_the_weights():
    router, x = TopK(8, 4, 1, "softmax_topk", False, bias="scores", init_std=1.0), torch.randn(30, 8)
    router.bias = torch.tensor([2.0, 0.0, 0.0, 0.0])
    routing = route(router, x)
    assert (routing.expert_N == 0).all() and torch.equal(routing.weight_N, routing.probs_TE[:, 0])
    router.bias = torch.tensor([0.0, 0.0, 0.0, -2.0])
    assert (route(router, x).expert_N != 3).all()


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_other_scores_are_weights_over_their_sum_and_probabilities_for_losses(score):
    x = torch.randn(30, 8)
    router = TopK(8, 4, 2, score=score, init_std=1.0, scale=2.5)
    routing = route(router, x)
    scores = {"sigmoid": torch.sigmoid, "sqrt_softplus": lambda z: (1 + z.exp()).log().sqrt()}[score](
        x @ router.weight.T
    )
    kept, index = scores.topk(2)
    expected = torch.zeros(30, 4).scatter(1, index, 2.5 * kept / kept.sum(1, keepdim=True))
    torch.testing.assert_close(routing.dense(), expected)
    torch.testing.assert_close(routing.probs_TE, scores / scores.sum(1, keepdim=True))


def test_a_token_visits_its_best_groups_only():
    routing = route(TopK(8, 8, 3, groups=4, top_groups=2, init_std=1.0), torch.randn(40, 8))
    visited = routing.chosen().unflatten(1, (4, 2)).any(2).sum(1)
    assert visited.max() == 2


def test_training_with_the_bias_evens_the_load():
    """Without a gradient: only ``after_step`` acts."""
    router, x = (
        TopK(8, 4, 1, score="sigmoid", bias="scores", bias_rate=0.01, init_std=0.3),
        torch.randn(400, 8) + 1,
    )
    before = expert_load(LayerRecord(0, route(router, x), Context())).max_over_mean
    for _ in range(60):
        router.after_step(expert_load(LayerRecord(0, route(router, x), Context())).tokens_per_expert)
    after = expert_load(LayerRecord(0, route(router, x), Context())).max_over_mean
    assert before > 1.5 and after < 1.15
