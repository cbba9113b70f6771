"""TAG and the routing-score losses against slow float64 references and the closed cases."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unimoe.continual.guidance import (
    AMBIGUOUS,
    NEW,
    OLD,
    GuidanceConfig,
    Guide,
    assignment,
    new_expert_balance,
    score_losses,
    token_types,
    top_weights,
)
from unimoe.continual.router import CosineTopK
from unimoe.errors import UserError
from unimoe.moe import Context, Routing, record, routing_context
from unimoe.moe.lora_linear import LoRALinear
from unimoe.moe.records import LayerRecord


def slow_type(row, old, tau):
    c_old, c_new = max(row[:old]), max(row[old:])
    larger = max(abs(c_old), abs(c_new))
    gap = abs(c_new - c_old) / larger if larger else 0.0
    if gap <= tau:
        return AMBIGUOUS
    return NEW if c_new > c_old else OLD


def slow_weights(row, k, temperature):
    kept = sorted(range(len(row)), key=lambda i: -row[i])[:k]
    top = max(row[i] for i in kept)
    powers = {i: math.exp((row[i] - top) / temperature) for i in kept}
    return [powers.get(i, 0.0) / sum(powers.values()) for i in range(len(row))]


def test_types_masks_and_losses_equal_the_slow_reference():
    scores = 0.3 * torch.randn(200, 12, dtype=torch.float64)
    scores[0] = 0  # both maxima zero: no division
    old, k, temperature = 8, 5, 0.1
    types = token_types(scores, old, 0.2)
    expected = [slow_type(row, old, 0.2) for row in scores.tolist()]
    assert types.tolist() == expected and {OLD, AMBIGUOUS, NEW} == set(expected)

    mask = assignment(scores, old, GuidanceConfig())
    for row, kind in zip(mask.tolist(), expected, strict=True):
        assert row == ([False] * 8 + [True] * 4 if kind == NEW else [True] * 8 + [False] * 4)
    open_mask = assignment(scores, old, GuidanceConfig(exclusive=False))
    assert open_mask[:, :old].all() and torch.equal(open_mask[:, old:], mask[:, old:])

    valid = torch.rand(200) < 0.7
    losses = score_losses(scores[valid], old, k, temperature)
    exc, spe = [], []
    for row, real in zip(scores.tolist(), valid.tolist(), strict=True):
        if not real:
            continue
        weight = slow_weights(row, k, temperature)
        g_old, g_new = sum(weight[:old]), sum(weight[old:])
        y = min(max(1 - max(weight[:old]), 0), 1)
        exc.append(g_old * g_new)
        log_new = max(math.log(g_new) if g_new else -100, -100)
        log_not = max(math.log1p(-g_new) if g_new < 1 else -100, -100)
        spe.append(-(y * log_new + (1 - y) * log_not))
    assert losses.exclusivity.item() == pytest.approx(sum(exc) / len(exc), abs=1e-12)
    assert losses.specialization.item() == pytest.approx(sum(spe) / len(spe), rel=1e-9)


def test_weights_equal_the_slow_reference():
    scores = torch.randn(50, 9, dtype=torch.float64)
    mask = torch.rand(50, 9) < 0.6
    mask[:, 0] = True
    index, weight = top_weights(scores, 4, 0.1, mask)
    gates = torch.zeros_like(scores).scatter(-1, index, weight)
    for row, allowed, gate in zip(scores.tolist(), mask.tolist(), gates, strict=True):
        masked = [value if ok else -math.inf for value, ok in zip(row, allowed, strict=True)]
        assert gate.tolist() == pytest.approx(slow_weights(masked, 4, 0.1), abs=1e-12)
    assert torch.equal(gates > 0, (gates > 0) & mask)


@pytest.mark.parametrize(
    ("task", "guided", "plain"),
    [(2, 0.30, 1 / 2), (3, 0.15, 1 / 3), (4, 0.09, 1 / 4), (5, 0.07, 1 / 5), (8, 0.03, 1 / 8)],
)
def test_cold_start_shares(task, guided, plain):
    """Random rows on both sides, 16 new and 16 (task - 1) old: what TAG lets in, and who wins without it."""
    tokens, width = 40_000, 64
    generator = torch.Generator().manual_seed(task)
    scores = torch.randn(tokens, 16 * task, generator=generator) / width**0.5
    old = 16 * (task - 1)
    share = (token_types(scores, old, 0.2) == NEW).float().mean().item()
    ambiguous = (token_types(scores, old, 0.2) == AMBIGUOUS).float().mean().item()
    wins = (scores.argmax(-1) >= old).float().mean().item()
    assert share == pytest.approx(guided, abs=0.015)  # the sheet's two digits and its sampling error
    assert 0.25 < ambiguous < 0.45
    assert wins == pytest.approx(plain, abs=4 * (plain / tokens) ** 0.5)


def test_the_target_saturates_for_small_cosines():
    scores = torch.randn(2000, 32) / 64
    target = score_losses(scores, 16, 16, 0.1).target_T
    assert target.mean().item() == pytest.approx(0.93, abs=0.015) and target.std() < 0.01


def test_balance_of_the_new_experts_is_one_when_uniform():
    scores = torch.zeros(10, 8)
    gates = torch.cat([torch.zeros(10, 4), torch.full((10, 4), 0.25)], 1)
    assert new_expert_balance(gates, scores, 4, 0.1).item() == pytest.approx(1)


def grown(guide, banks=2, k=4):
    layer = LoRALinear(nn.Linear(8, 6), 2.0, "layer")
    layer.router = CosineTopK(8, k, temperature=0.05, guide=guide)
    for _ in range(banks):
        nn.init.normal_(layer.add_bank(4, 2).B)
        layer.router.add_rows(4)
    return layer


def test_all_tokens_old_is_the_previous_model():
    """Nothing is admitted: the outputs are those before the bank was added, to the last bit."""
    guide = Guide(GuidanceConfig(admit=()))
    layer = grown(guide, banks=1)
    x = torch.randn(40, 8)
    before = layer(x)
    nn.init.normal_(layer.add_bank(4, 2).B)
    layer.router.add_rows(4)
    guide.guided = True
    assert torch.equal(layer(x), before)
    guide.guided = False
    assert not torch.equal(layer(x), before)  # at inference the new bank takes part


def test_a_step_leaves_old_banks_and_rows_alone():
    guide = Guide(GuidanceConfig(exclusivity=1.0, specialization=1.0))
    layer = grown(guide)
    layer.banks[0].requires_grad_(False)
    layer.router.rows[0].requires_grad_(False)
    old = [p.clone() for p in (layer.banks[0].A, layer.banks[0].B, layer.router.rows[0])]
    new = [p.clone() for p in (layer.banks[1].A, layer.banks[1].B, layer.router.rows[1])]
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    guide.guided, guide.step, guide.steps = True, 9, 10
    with record() as records:
        loss = layer(torch.randn(64, 8)).square().mean()
    (loss + guide.loss(records, 4, 4, 0.05)[0]).backward()
    optimizer.step()
    for before, now in zip(old, (layer.banks[0].A, layer.banks[0].B, layer.router.rows[0]), strict=True):
        assert torch.equal(before, now)
    for before, now in zip(new, (layer.banks[1].A, layer.banks[1].B, layer.router.rows[1]), strict=True):
        assert not torch.equal(before, now)


def test_old_and_ambiguous_tokens_do_not_train_the_new_bank():
    guide = Guide(GuidanceConfig(exclusivity=0, specialization=0))
    layer = grown(guide)
    guide.guided = True
    x = torch.randn(200, 8)
    types = token_types(layer.router.scores(x), 4, 0.2)
    layer(x[types != NEW]).square().sum().backward()
    assert layer.banks[1].A.grad is None and layer.router.rows[1].grad.abs().sum() == 0
    layer(x[types == NEW]).square().sum().backward()
    assert layer.banks[1].A.grad.abs().sum() > 0 and layer.router.rows[1].grad.abs().sum() > 0


def test_checkpointing_gives_the_same_gradients():
    """The layer runs again in the backward pass: the losses are those of the first run, and the mask is still
    there."""
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        guide = Guide(GuidanceConfig(exclusivity=1.0, specialization=1.0))
        layer = grown(guide)
        guide.guided, guide.step, guide.steps = True, 9, 10
        x = torch.randn(30, 8)
        with record() as records, routing_context(Context(pad_T=torch.arange(30) >= 25)):
            y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        loss, tokens = guide.loss(records, 4, 4, 0.05)
        assert tokens == 25
        (y.square().mean() + loss).backward()
        assert len(records) == 1
        gradients.append([p.grad for p in (*layer.banks[1].parameters(), layer.router.rows[1])])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_the_losses_are_means_over_real_tokens_and_routers():
    """Two forward passes of different lengths, one of them padded, under two routers."""
    torch.manual_seed(0)
    guide = Guide(GuidanceConfig(exclusivity=0.5, specialization=0.25, balance=0.125))
    guide.guided, guide.step, guide.steps = True, 9, 10
    layers = [grown(guide), grown(guide)]
    pads = [torch.arange(20) >= 12, torch.zeros(7, dtype=torch.bool)]
    with record() as records:
        for pad in pads:
            with routing_context(Context(pad_T=pad)):
                for layer in layers:
                    layer(torch.randn(len(pad), 8))
    loss, tokens = guide.loss(records, 4, 4, 0.05)
    assert tokens == 2 * (12 + 7)
    total = 0.0
    for entry in records:
        real = ~entry.ctx.pad_T
        scores, weights = entry.routing.logits_TE[real], entry.routing.dense()[real]
        one = score_losses(scores, 4, 4, guide.config.loss_temperature)
        term = 0.5 * one.exclusivity + 0.25 * one.specialization
        total += real.sum() * (term + 0.125 * new_expert_balance(weights, scores, 4, 0.05))
    torch.testing.assert_close(loss, total / tokens)
    guide.step = 0
    assert guide.has_loss  # the balance loss has no ramp
    guide.config.balance = 0.0
    assert not guide.has_loss
    guide.step, guide.guided = 9, False
    assert not guide.has_loss


def test_ramp_and_warm_up():
    guide = Guide(GuidanceConfig(warmup_steps=3))
    guide.steps = 101
    ramps = []
    for guide.step in (0, 50, 75, 100):
        ramps.append(guide.ramp)
    assert ramps[0] == ramps[1] == 0 and 0.4 < ramps[2] < 0.6 and ramps[3] == 1
    layer = grown(guide)
    scores = layer.router.scores(torch.randn(5, 8))
    guide.guided, guide.step = True, 2
    assert guide.mask(scores, sum(layer.router.sizes[:-1])) is None
    guide.step = 3
    assert guide.mask(scores, sum(layer.router.sizes[:-1])) is not None


def test_observations_count_real_tokens():
    guide = Guide(GuidanceConfig())
    layer = grown(guide)
    guide.guided = True
    with record() as records, routing_context(Context(pad_T=torch.arange(20) >= 12)):
        layer(torch.randn(20, 8))
    seen = guide.observe(records, [4, 4], 4)
    assert list(seen) == [-1]  # the layer of this test lies in no block
    assert seen[-1].tokens == 12 and seen[-1].types.sum() == 12 and seen[-1].target[2] == 12
    assert seen[-1].mass.sum().item() == pytest.approx(12, abs=1e-4)


def test_observations_of_the_projections_of_a_block_are_added():
    guide = Guide(GuidanceConfig())
    scores, weights = torch.randn(5, 8), torch.rand(5, 8)
    routing = Routing.from_mask(weights > 0, weights, scores, weights)
    seen = guide.observe([LayerRecord(3, routing, Context(), name) for name in ("q", "k")], [4, 4], 4)
    assert list(seen) == [3] and seen[3].tokens == 10
    torch.testing.assert_close(seen[3].mass, 2 * torch.stack([weights[:, :4].sum(), weights[:, 4:].sum()]))
    assert seen[3].types.sum() == 0  # of the first task


def test_half_precision_inputs_are_routed_in_float32():
    layer = grown(None)
    x = torch.randn(16, 8).bfloat16()
    assert layer.router.scores(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.router.scores(x), layer.router.scores(x.float()))


def test_unknown_type():
    with pytest.raises(UserError, match="'fresh', expected some of old, ambiguous, new"):
        GuidanceConfig(admit=("fresh",))


def test_losses_are_taken_outside_of_autocast(monkeypatch):
    """CUDA's autocast refuses the binary cross-entropy of probabilities."""
    losses = []

    def bce(*args):
        losses.append(torch.is_autocast_enabled("cpu"))
        return torch.zeros(())

    monkeypatch.setattr("torch.nn.functional.binary_cross_entropy", bce)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score_losses(torch.randn(5, 4), 2, 2, 0.1)
    assert losses == [False]
