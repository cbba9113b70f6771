from typing import Any

import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import (
    Context,
    LayerRecord,
    Routing,
    TopK,
    device_balance,
    expert_load,
    load_balance,
    sequence_balance,
)
from unimoe.moe.losses.auxiliary import alone
from unimoe.moe.losses.dts_balance import dts_balance
from unimoe.moe.losses.top1_balance import top1_balance


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
    assert load_balance([]).shape == (0,)


@pytest.mark.parametrize("loss", [load_balance, dts_balance, top1_balance])
def test_layers_with_unequal_numbers_of_experts_have_the_losses_of_each_alone(loss):
    other = TopK(8, 3, 2, init_std=1.0)(torch.randn(32, 8), Context())
    wide, narrow = random(), LayerRecord(1, other, Context())
    torch.testing.assert_close(loss([wide, narrow]), torch.cat([loss([wide]), loss([narrow])]))


def test_balance_equals_its_definition():
    one = random()
    f = torch.bincount(one.routing.expert_N, minlength=4) / 64
    torch.testing.assert_close(load_balance([one])[0], 4 * (f * one.routing.probs_TE.mean(0)).sum())


def test_balance_gradient_pushes_down_the_busy_expert():
    x = torch.randn(32, 8)
    router: Any = TopK(8, 4, 1, init_std=1.0)
    busy = expert_load(LayerRecord(0, router(x, Context()), Context())).share.argmax()
    before = router(x, Context()).probs_TE.mean(0)[busy].item()
    for _ in range(20):
        router.zero_grad()
        load_balance([LayerRecord(0, router(x, Context()), Context())]).sum().backward()
        with torch.no_grad():
            router.weight -= 0.5 * router.weight.grad
    assert router(x, Context()).probs_TE.mean(0)[busy].item() < before


def test_two_ranks_have_the_loss_and_the_gradients_of_one():
    """Ranks of 32 and 16 tokens; their mean gradient is that of the 48 together."""
    torch.manual_seed(1)
    router, x = TopK(8, 4, 2, init_std=1.0), torch.randn(48, 8)

    def gradient(rows: list[slice], across: Any) -> tuple[torch.Tensor, torch.Tensor]:
        records = [LayerRecord(0, router(x[one], Context()), Context()) for one in rows]
        loss = torch.stack([load_balance([one], across=across(one, records)) for one in records]).mean()
        return loss, torch.autograd.grad(loss, router.weight)[0]

    def of_ranks(own: LayerRecord, every: list[LayerRecord]) -> Any:
        counts = [
            torch.cat([load.tokens_per_expert, load.tokens[None]])
            for load in (expert_load(one) for one in every)
        ]
        probabilities = [one.routing.probs_TE.sum(0) for one in every]

        def across(values: torch.Tensor) -> torch.Tensor:
            """The first call asks for counts, the second for sums of probabilities."""
            mean = torch.stack(probabilities if values.requires_grad else counts).mean(0).detach()
            return values - values.detach() + mean

        return across

    together = gradient([slice(0, 48)], lambda own, every: alone)
    apart = gradient([slice(0, 32), slice(32, 48)], of_ranks)
    for found, expected in zip(apart, together, strict=True):
        torch.testing.assert_close(found, expected)


def test_padding_counts_nowhere():
    torch.manual_seed(3)
    x, router = torch.randn(12, 8), TopK(8, 4, 2, init_std=1.0)
    pad = torch.zeros(12, dtype=torch.bool)
    pad[[1, 5, 11]] = True
    padded = LayerRecord(0, router(x, Context()), Context(pad_T=pad))
    without = LayerRecord(0, router(x[~pad], Context()), Context())
    torch.testing.assert_close(load_balance([padded]), load_balance([without]))
    assert not torch.allclose(
        load_balance([padded]), load_balance([LayerRecord(0, padded.routing, Context())])
    )


def test_only_padding_is_zero_and_finite():
    ctx = Context(pad_T=torch.ones(8, dtype=torch.bool))
    assert load_balance([uniform(ctx=ctx)]) == 0


@pytest.mark.parametrize("loss", [load_balance, device_balance, sequence_balance])
def test_two_ranks_balance_as_one(loss, same_on_two_ranks):
    same_on_two_ranks(loss)


def test_exact_device_balance_with_an_expert_on_each_device_is_that_of_the_experts():
    one = random()
    torch.testing.assert_close(device_balance([one], devices=4), load_balance([one]))
    torch.testing.assert_close(device_balance([one], devices=1), torch.ones(1))
    f, P = 4 * expert_load(one).share, one.routing.probs_TE.mean(0)
    expected = f[:2].mean() * P[:2].sum() + f[2:].mean() * P[2:].sum()
    torch.testing.assert_close(device_balance([one], devices=2)[0], expected)
    with pytest.raises(UserError, match="devices is 3, expected a divisor of 4"):
        device_balance([one], devices=3)


def test_sequence_balance_is_the_mean_over_samples():
    sample = torch.tensor([4] * 20 + [9] * 8 + [2] * 4)
    pad = torch.zeros(32, dtype=torch.bool)
    pad[28:30] = True
    whole = random(Context(sample_T=sample, pad_T=pad))
    losses = []
    for number in (4, 9, 2):
        rows = (sample == number) & ~pad
        chosen, probs = whole.routing.chosen()[rows].float(), whole.routing.probs_TE[rows]
        losses.append(4 * (chosen.mean(0) / 2 * probs.mean(0)).sum())  # k = 2
    torch.testing.assert_close(sequence_balance([whole])[0], torch.stack(losses).mean())


def test_exact_sequence_balance_of_one_sample_is_the_balance_loss():
    one = random()
    torch.testing.assert_close(sequence_balance([one]), load_balance([one]))
    skewed = [LayerRecord(0, collapsed().routing, Context(sample_T=torch.arange(8) // 2)), uniform()]
    torch.testing.assert_close(sequence_balance(skewed), torch.tensor([4.0, 1.0]))


def test_sequence_balance_of_padding_alone_is_zero():
    assert sequence_balance([uniform(ctx=Context(pad_T=torch.ones(8, dtype=torch.bool)))]) == 0
