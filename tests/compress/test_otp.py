"""Heads that say how many experts a token keeps. Shapes: T tokens, K slots."""

import pytest
import torch

from unimoe.compress.otp import Heads, KeepHead, Masking, gumbel, hard_mask, soft_mask
from unimoe.compress.route import route
from unimoe.compress.rows import rewritten
from unimoe.compress.skip_rules import install
from unimoe.compress.tune import TuneConfig, distil
from unimoe.moe import Context, routing_context
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral

IDS = torch.tensor([[5, 6, 7, 5, 6, 8, 9, 3]])


def test_patterns_are_prefixes_and_the_first_expert_is_always_kept():
    logits_TK = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 5.0], [0.0, 5.0, 0.0]])
    assert hard_mask(logits_TK).tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    mask_TK = soft_mask(logits_TK, torch.zeros_like(logits_TK), 0.05)
    assert torch.allclose(mask_TK, hard_mask(logits_TK).float(), atol=1e-6)
    warm_TK = soft_mask(torch.randn(9, 3), gumbel(torch.zeros(9, 3)), 1.0)
    assert torch.allclose(warm_TK[:, 0], torch.ones(9)) and bool((warm_TK.diff(dim=1) <= 0).all())


def test_gradients_of_the_soft_mask_are_those_of_differences():
    noise_TK = gumbel(torch.zeros(2, 3, dtype=torch.float64))
    logits_TK = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: soft_mask(one, noise_TK, 0.7), (logits_TK,))


def test_fresh_heads_keep_everything_bit_for_bit():
    plain, model = tiny_mixtral(), tiny_mixtral()
    install(view(model), Heads(width=8))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    names = {name for name in model.state_dict() if "keep_head" in name}
    assert len(names) == 2 * 4, "two layers, two linear layers each with its bias"


def test_a_penalty_makes_heads_keep_less_and_rules_follow_their_argmax():
    model = tiny_mixtral(top_k=3)
    layers = view(model)
    install(layers, Heads(width=8))
    heads = [parameter for layer in layers for parameter in layer.block.keep_head.parameters()]
    batch = {"input_ids": IDS, "labels": IDS}
    masking = Masking()
    distil(
        model,
        [batch],
        heads,
        TuneConfig(steps=30, lr=0.05, penalty=20.0),
        student=lambda step: rewritten(layers, masking),
        penalty=masking.penalty,
    )
    seen = []

    def look(layer, x_TD, index_TK, weight_TK):
        seen.append(weight_TK > 0)
        return index_TK, weight_TK

    with torch.no_grad(), route(layers, look):
        model(input_ids=IDS)
    kept = torch.stack(seen).float().mean()
    assert 1 / 3 <= kept < 0.7 and all(bool(one[:, 0].all()) for one in seen)


def test_a_head_reads_the_token_and_its_weights():
    head = KeepHead(4, 2, width=6)
    assert head(torch.randn(3, 4), torch.rand(3, 2)).shape == (3, 2)
    torch.nn.init.normal_(head.down.weight)
    x_TD = torch.randn(1, 4).expand(2, 4)
    first, second = head(x_TD, torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    assert not torch.equal(first, second)


def test_padding_does_not_count_as_kept():
    layers = view(tiny_mixtral(top_k=3))
    Heads(8).attach(layers)
    pad_T = torch.tensor([True, False])
    index_TK, weight_TK = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[0.5, 0.3, 0.2]] * 2)
    layer = layers[0]
    logits_TK = torch.tensor([[0.0, 0.0, 999.0], [999.0, 0.0, 0.0]])  # the padding would keep all
    layer.block.keep_head.forward = lambda x_TD, weight_TK: logits_TK
    masking = Masking(0.01)
    with routing_context(Context(pad_T=pad_T)):
        masking(layer, torch.zeros(2, 32), index_TK, weight_TK)
    assert float(masking.penalty()) == pytest.approx(1 / 3)
