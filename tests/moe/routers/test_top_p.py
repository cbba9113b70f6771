"""Against slow references, token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe import (
    Context,
    MoELayer,
    RouterDescription,
    Routing,
    SwiGLUExperts,
    TopP,
    expert_load,
    load_balance,
    record,
)

H = 8


def slow_choice(logits: Tensor, p: float) -> list[int]:
    """Indices of the chosen experts of one token."""
    probs, chosen, mass = logits.softmax(0), [], 0.0
    for expert in sorted(range(len(logits)), key=lambda e: -logits[e].item()):
        chosen.append(expert)
        mass += probs[expert].item()
        if mass >= p:
            break
    return chosen


def slow_layer(moe: Any, x: Tensor) -> Tensor:
    """Top-p routing with null and shared experts, one token after another."""
    router, rows = moe.router, []
    for token in x:
        logits = router.weight @ token
        chosen = slow_choice(logits[: router.num_experts], router.p)
        shared = range(router.num_experts, len(logits))
        kept = [*chosen, *shared]
        weights = logits[kept].softmax(0) if router.renormalize else logits.softmax(0)[kept]
        y = torch.zeros_like(token)
        for expert, weight in zip(kept, weights, strict=True):
            if expert < moe.experts.num_experts:
                y = y + weight * ffn(moe.experts, expert, token)
            elif expert >= router.num_experts:
                y = y + weight * ffn(moe.shared, expert - router.num_experts, token)
        rows.append(y)
    return torch.stack(rows)


def ffn(experts: SwiGLUExperts, index: int, x: Tensor) -> Tensor:
    gate, up = (experts.gate_up_proj[index] @ x).chunk(2)
    return experts.down_proj[index] @ (nn.functional.silu(gate) * up)


def layer(p: float = 0.7, null: int = 1, shared: int = 2, **kw: Any) -> Any:
    router = TopP(H, 4, p, null, shared, init_std=0.5, **kw)
    experts = SwiGLUExperts(4, H, 12, init_std=0.3)
    return MoELayer(router, experts, shared=SwiGLUExperts(shared, H, 6, init_std=0.3) if shared else None)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("null", "shared"), [(0, 0), (1, 0), (0, 2), (2, 2)])
def test_output_and_gradients_equal_the_slow_layer(null, shared, renormalize):
    moe = layer(null=null, shared=shared, renormalize=renormalize).double()
    x = torch.randn(30, H, dtype=torch.float64)
    # the router computes in float32
    torch.testing.assert_close(moe(x), slow_layer(moe, x), rtol=1e-5, atol=1e-6)
    leaves = list(moe.parameters())
    ours = torch.autograd.grad(moe(x).square().sum(), leaves)
    theirs = torch.autograd.grad(slow_layer(moe, x).square().sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("probs", "p", "count"),
    [([1 / 16] * 16, 0.4, 7), ([0.5, 0.3, 0.2], 0.4, 1), ([0.5, 0.3, 0.2], 0.7, 2), ([0.1] * 10, 1.0, 10)],
)
def test_how_many_are_kept(probs, p, count):
    assert TopP(H, len(probs), p).counts(torch.tensor([probs])).tolist() == [count]


def test_more_mass_keeps_a_superset():
    router, x = TopP(H, 8, 0.3, init_std=1.0), torch.randn(50, H)
    few = router(x, Context())
    router.p = 0.8
    many = router(x, Context())
    pairs = [set(zip(r.token_N.tolist(), r.expert_N.tolist(), strict=True)) for r in (few, many)]
    assert pairs[0] < pairs[1]
    assert few.token_N.unique().numel() == 50


def test_weights_of_chosen_and_shared_sum_to_one():
    routing = layer().router(torch.randn(20, H), Context())
    sums = torch.zeros(20).index_add(0, routing.token_N, routing.weight_N) + routing.extra["shared_TS"].sum(1)
    torch.testing.assert_close(sums, torch.ones(20))


def test_tokens_that_choose_nothing_but_null_experts_get_zeros():
    moe = layer(shared=0)
    x = torch.randn(6, H)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[4] = 50 * x[0]
    with record() as records:
        y = moe(x[:1].repeat(3, 1))
    assert y.count_nonzero() == 0
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())
    assert expert_load(records[0]).share.tolist() == [0, 0, 0, 0, 1]  # the null expert's load is seen
    assert load_balance(records).item() == pytest.approx(5)


def test_mixer_draws_as_many_experts_as_hold_the_mass_in_training_only():
    moe, x = layer(gradient_estimator="code", null=0), torch.randn(40, H)
    plain = layer(null=0)
    plain.load_state_dict(moe.state_dict())
    assert torch.equal(moe.eval()(x), plain.eval()(x))
    routing = moe.train().router(x, Context())
    assert torch.equal(routing.token_N.bincount(), plain.router(x, Context()).token_N.bincount())
    sums = torch.zeros(40).index_add(0, routing.token_N, routing.weight_N) + routing.extra["shared_TS"].sum(1)
    torch.testing.assert_close(sums, torch.ones(40))
    routing.weight_N.square().sum().backward()
    assert moe.router.weight.grad.isfinite().all() and moe.router.weight.grad.abs().sum() > 0


def test_ragged_pairs_are_sorted_by_expert():
    chosen = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    weight = torch.arange(9.0).reshape(3, 3)
    routing = Routing.from_mask(chosen, weight, weight, weight)
    assert routing.expert_N.tolist() == [0, 2, 2] and routing.token_N.tolist() == [0, 0, 1]
    assert routing.weight_N.tolist() == [0, 2, 5] and routing.offsets_E1.tolist() == [0, 1, 1, 3]
    assert routing.first(2).token_N.tolist() == [0] and routing.first(3) is routing


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="moe.router.p is 1.5"):
        TopP(H, 4, 1.5)
    with pytest.raises(UserError, match="gradient_estimator is 'grin', expected one of paper, code"):
        TopP(H, 4, gradient_estimator="grin")  # type: ignore[arg-type]


def test_it_describes_an_untrained_router():
    """With equal probabilities: the first multiple of 1 / E that reaches p."""
    assert TopP(H, 4, 0.7).describe() == RouterDescription(4, 3, fixed=False)
    assert TopP(H, 3, 0.7, null_experts=1).describe() == RouterDescription(4, 3, fixed=False)
    assert TopP(H, 4, 1.0).describe().experts_per_token == 4
