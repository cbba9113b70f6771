import copy

import pytest
import torch

from unimoe.compress.bit_router import BitRouter, Reading, all_bits, reading
from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.errors import UserError
from unimoe.moe.view import view

from .conftest import logits


def test_probabilities_of_each_experts_own_map():
    router = BitRouter(3, 8, [2, 3, 4])
    torch.nn.init.normal_(router.weight)
    x, expert = torch.randn(10, 8), torch.randint(0, 3, (10,))
    p = router(x, expert)
    torch.testing.assert_close(p.sum(1), torch.ones(10))
    for row in range(10):
        logits = router.weight[expert[row]] @ x[row] + router.bias[expert[row]]
        torch.testing.assert_close(p[row], logits.softmax(0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "unimoe"])
def test_routers_of_bits_are_saved_and_read_what_they_choose(family, families, ids, tmp_path):
    """Untrained ones read all bits: the packed model as it was. All pairs at 2 bits are experts cut to 2."""
    packed = families(family)
    compress(packed, Plan(bits=4, group=16))
    model = copy.deepcopy(packed)
    compress(model, Plan(nested=[2, 3, 4]))
    before, layers = logits(packed, ids), view(model)
    assert (logits(model, ids) - before).abs().max() < 1e-5
    with reading(Reading(lambda p_NB: torch.zeros_like(p_NB[:, 0], dtype=torch.long))) as read:
        coarse = logits(model, ids)
    assert read.mean_bits([2, 3, 4]) == 2
    routed = [vars(layer.experts).pop("forward") for layer in layers]
    for layer in layers:
        layer.experts.level = 2
    assert (logits(model, ids) - coarse).abs().max() < 1e-5 < (coarse - before).abs().max()
    for layer, forward in zip(layers, routed, strict=True):
        layer.experts.level, layer.experts.forward = 0, forward
        torch.nn.init.normal_(layer.block.bit_router.weight)
        layer.block.bit_router.bias.zero_()
    mixed = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with reading(Reading()) as read:
        assert torch.equal(logits(loaded, ids), mixed)
    assert read.pairs_B is not None and (read.pairs_B > 0).all()


def test_a_soft_reading_is_the_mean_over_bits_and_has_a_gradient(families, ids):
    model = families("mixtral")
    compress(model, Plan(bits=4, group=16))
    compress(model, Plan(nested=[2, 4]))
    block = view(model)[0].block
    block.bit_router.bias.data[:] = 0
    x = torch.randn(1, 5, ids.new_tensor(block.gate.weight.shape)[-1])
    outputs = []
    for place in (0, 1):
        with torch.no_grad(), reading(Reading(lambda p, at=place: torch.full_like(p[:, 0], at).long())):
            outputs.append(block(x))
    soft = Reading(soft=True)
    with reading(soft):
        y = block(x)
    assert soft.price() == 3.0
    torch.testing.assert_close(y, (outputs[0] + outputs[1]) / 2, rtol=0, atol=0.02 * float(y.abs().max()))
    y.square().sum().backward()
    assert block.bit_router.weight.grad.abs().sum() > 0


def test_bits_that_experts_do_not_have_are_refused(families):
    model = families("mixtral")
    with pytest.raises(UserError, match="expected packed experts: run `unimoe compress quantize"):
        compress(model, Plan(nested=[2, 4]))
    compress(model, Plan(bits=4, group=16))
    for levels, found in (([2, 8], "experts of 4 bits"), ([1, 4], "--levels 1"), ([3, 2, 4], "--levels 3 2")):
        with pytest.raises(UserError, match=found):
            compress(model, Plan(nested=levels))
    compress(model, Plan(nested=[2, 4]))
    with pytest.raises(UserError, match="routers of bits already"):
        compress(model, Plan(nested=[2, 4]))
    with reading(Reading(all_bits)) as read:
        logits(model, torch.ones(1, 3, dtype=torch.long))
    assert read.mean_bits([2, 4]) == 4
