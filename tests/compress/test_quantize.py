from functools import partial

import pytest
import torch

from unimoe.compress.quantize import (
    Calibration,
    Coverage,
    bits_by_rule,
    choose_bits,
    layer_kl,
    quantize_experts,
    write_back,
)
from unimoe.compress.rules import Rules
from unimoe.errors import UserError
from unimoe.moe.view import view
from unimoe.testing_stock import STOCK


def calibrated(name, count=6, memory=2e9):
    model = STOCK[name]().eval()
    data = [torch.randint(1, 64, (4, 16)) for _ in range(count)]

    @torch.no_grad()
    def forward(ids):
        return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)

    return model, view(model), Calibration(forward, data, forward, memory)


def kl(before, after):
    return (before.exp() * (before - after)).sum(-1).mean().item()


@pytest.mark.parametrize("name", STOCK)
def test_all_weights_of_all_families_are_quantized(name):
    _, layers, data = calibrated(name, 2)
    before = data.forward(data.batches[0])
    bits = [[2, *[4] * (layer.num_experts - 1)] for layer in layers]
    coverage = quantize_experts(layers, bits, write_back, group=8, data=data, least=1)
    coverage.check()
    assert coverage.total > 0 and coverage.bits / coverage.total == sum(bits[0]) / len(bits[0])
    for layer in layers:
        for matrix in layer.expert(0).values():
            for group in matrix.unflatten(1, (-1, 8)).flatten(0, 1):
                assert len(group.unique()) <= 4  # of 8 values in 2 bits
    assert 0 < kl(before, data.forward(data.batches[0])) < 0.5


def test_gptq_changes_the_model_less_than_rounding():
    found = {}
    for how in ("rtn", "gptq"):
        torch.manual_seed(0)
        _, layers, data = calibrated("mixtral", 12)
        before = [data.forward(ids) for ids in data.batches]
        quantize_experts(layers, [[3] * 4] * 2, write_back, 16, how, data, least=1).check()
        found[how] = sum(kl(one, data.forward(ids)) for one, ids in zip(before, data.batches, strict=True))
    assert found["gptq"] < 0.7 * found["rtn"]


def test_layers_in_flight_do_not_change_what_the_first_group_becomes():
    weights = []
    for memory in (1, 1e9):  # a layer at a time, and all of them
        torch.manual_seed(0)
        _, layers, data = calibrated("mixtral", memory=memory)
        quantize_experts(layers, [[4] * 4] * 2, write_back, 16, data=data, least=1)
        weights.append(layers[0].stacks()["gate_up_proj"].clone())
    assert torch.equal(*weights)


def test_starved_experts_are_rounded_and_named(caplog):
    _, layers, data = calibrated("olmoe")
    codes = []
    put = partial(lambda layer, own, bits: codes.append(own))
    coverage = quantize_experts(layers, [[4] * 8] * 2, put, 8, data=data, least=10**6)
    coverage.check()
    assert len(coverage.starved) == 16 and "model.layers.0.mlp expert 0 (" in coverage.starved[0]
    assert "for want of calibration tokens: model.layers.0.mlp expert 0" in caplog.text
    rounded = []
    quantize_experts(layers, [[4] * 8] * 2, lambda layer, own, bits: rounded.append(own), 8, "rtn")
    assert all(torch.equal(a["up"][0], b["up"][0]) for a, b in zip(codes[0], rounded[0], strict=True))


def test_a_part_that_was_left_out_is_an_error():
    with pytest.raises(UserError, match=r"only 50\.0 % of the experts' weights were quantized"):
        Coverage(total=200, touched=100).check()


@pytest.mark.parametrize("by_layer", [False, True])
def test_chosen_bits_keep_the_budget_and_beat_the_same_bits_shuffled(by_layer):
    _, layers, data = calibrated("olmoe", 4)
    bits = choose_bits(layers, data, 3.0, (2, 3, 4), 8, (0.0, 0.0, 2.0), by_layer)
    assert sum(map(sum, bits)) <= 3 * 16
    if by_layer:
        assert all(3 in own and 4 in own and sum(own) <= 24 for own in bits)
    shuffled = [[own[(place + 3) % 8] for place in range(8)] for own in bits]
    found = []
    for chosen in (bits, shuffled):
        torch.manual_seed(0)
        _, layers, data = calibrated("olmoe", 4)
        before = [data.forward(ids) for ids in data.batches]
        quantize_experts(layers, chosen, write_back, 8, "rtn")
        found.append(sum(kl(one, data.forward(ids)) for one, ids in zip(before, data.batches, strict=True)))
    assert found[0] < found[1]


def test_a_layer_that_matters_more_gets_more_bits():
    """Both layers err as much, but the answers are made of the first one alone."""
    _, layers, data = calibrated("olmoe", 8)
    state = [{name: stack.clone() for name, stack in layer.stacks().items()} for layer in layers]
    measured = layer_kl(layers, data, 2, 8)
    same = [{name: torch.equal(stack, old[name]) for name, stack in layer.stacks().items()}
            for layer, old in zip(layers, state, strict=True)]  # fmt: skip
    assert all(all(one.values()) for one in same) and all(kl > 0 for kl in measured)
    data.answers = lambda ids: (10 * layers[0].stacks()["down_proj"][0]).log_softmax(-1)
    bits = choose_bits(layers, data, 3.0, (2, 3, 4), 8, (0.0, 0.0, 2.0), sensitive=True)
    assert bits == [[4] * 8, [2] * 8]


def test_a_budget_that_cannot_be_met_is_one_line():
    _, layers, data = calibrated("mixtral", 1)
    with pytest.raises(UserError, match=r"--bits 1\.5 cannot be met with \[2, 3, 4\] bits"):
        choose_bits(layers, data, 1.5, group=8)


def test_bits_by_rule_name_layers_of_the_decoder():
    model = STOCK["deepseek_v3"](num_hidden_layers=3)
    assert bits_by_rule(view(model), Rules("main_2.layer_2_4.exp_l1e3_8")) == [
        [2, 2, 2, 8] + [2] * 4,
        [4] * 8,
    ]
    with pytest.raises(UserError, match=r"expert 0 of model\.layers\.1\.mlp \[2, 4\] bits"):
        bits_by_rule(view(model), Rules("main_2.keyword__gate_proj__4"))
