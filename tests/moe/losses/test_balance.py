from typing import Any

import torch

from unimoe.moe import Context, ExpertLoad, LayerRecord, Routing, TopK, expert_load, load_balance


def uniform(tokens=8, E=4, k=2, ctx=None):
    """Every expert gets the same number of pairs, every probability is 1/E."""
    index = torch.stack([(torch.arange(tokens) * k + slot) % E for slot in range(k)], dim=1)
    logits = torch.zeros(tokens, E, requires_grad=True)
    weight = torch.full((tokens, k), 1 / k)
    return LayerRecord(0, Routing.from_topk(index, weight, logits, logits.softmax(-1), E), ctx or Context())


def random(ctx=None, tokens=32):
    x = torch.randn(tokens, 8)
    return LayerRecord(0, TopK(8, 4, 2, init_std=1.0)(x, Context()), ctx or Context())


def collapsed(tokens=8, E=4):
    logits = torch.zeros(tokens, E)
    logits[:, 0] = 50.0
    index = torch.zeros(tokens, 1, dtype=torch.int64)
    return LayerRecord(
        1, Routing.from_topk(index, torch.ones(tokens, 1), logits, logits.softmax(-1), E), Context()
    )


def test_uniform_routing_is_one_and_collapse_is_the_number_of_experts():
    losses = load_balance([uniform(), collapsed()])
    torch.testing.assert_close(losses, torch.tensor([1.0, 4.0]))
    assert load_balance(uniform()).shape == ()
    assert load_balance([]).shape == (0,)


def test_balance_equals_its_definition():
    one = random()
    f = torch.bincount(one.routing.expert_N, minlength=4) / 64
    torch.testing.assert_close(load_balance(one), 4 * (f * one.routing.probs_TE.mean(0)).sum())


def test_balance_gradient_pushes_down_the_busy_expert():
    x = torch.randn(32, 8)
    router: Any = TopK(8, 4, 1, init_std=1.0)
    busy = expert_load(LayerRecord(0, router(x, Context()), Context())).share.argmax()
    before = router(x, Context()).probs_TE.mean(0)[busy].item()
    for _ in range(20):
        router.zero_grad()
        load_balance(LayerRecord(0, router(x, Context()), Context())).backward()
        with torch.no_grad():
            router.weight -= 0.5 * router.weight.grad
    assert router(x, Context()).probs_TE.mean(0)[busy].item() < before


def test_load_of_a_global_batch_can_be_given():
    one = random()
    share = torch.tensor([1.0, 0, 0, 0])
    expected = 4 * one.routing.probs_TE.mean(0)[0]
    torch.testing.assert_close(load_balance(one, ExpertLoad(share)), expected)
    torch.testing.assert_close(load_balance([one], ExpertLoad(share[None])), expected[None])


def test_the_tokens_of_a_global_batch_divide_the_probabilities():
    one = random()
    load = expert_load(one)
    twice = ExpertLoad(load.tokens_per_expert, 2 * load.tokens)
    torch.testing.assert_close(load_balance(one, twice), load_balance(one) / 2)


def test_padding_counts_nowhere():
    torch.manual_seed(3)
    x, router = torch.randn(12, 8), TopK(8, 4, 2, init_std=1.0)
    pad = torch.zeros(12, dtype=torch.bool)
    pad[[1, 5, 11]] = True
    padded = LayerRecord(0, router(x, Context()), Context(pad_T=pad))
    without = LayerRecord(0, router(x[~pad], Context()), Context())
    torch.testing.assert_close(load_balance(padded), load_balance(without))
    assert not torch.allclose(load_balance(padded), load_balance(LayerRecord(0, padded.routing, Context())))


def test_only_padding_is_zero_and_finite():
    ctx = Context(pad_T=torch.ones(8, dtype=torch.bool))
    assert load_balance(uniform(ctx=ctx)) == 0
