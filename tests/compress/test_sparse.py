import pytest
import torch

from unimoe.compress.sparse import owl_sparsity, second_stage, sparsify, wanda_mask
from unimoe.compress.watch import Collector
from unimoe.errors import UserError
from unimoe.moe.view import view


def test_both_stages_together_have_the_total_sparsity():
    second = second_stage(0.4, 0.25)
    assert abs((1 - 0.25) * (1 - second) - 0.6) < 1e-12 and second_stage(0.3, 0.3) == 0
    with pytest.raises(UserError, match="cannot follow one of 0.5"):
        second_stage(0.4, 0.5)


def test_wanda_is_exact_in_every_row_and_beats_magnitude_on_correlated_inputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 32, generator=generator)
    x = torch.randn(500, 32, generator=generator) * torch.logspace(-1, 1, 32)
    x = x + 0.3 * x[:, :1]
    mask = wanda_mask(weight, x.norm(dim=0), 0.5)
    assert (mask.sum(1) == 16).all() and mask.sum(0).unique().numel() > 1
    by_size = wanda_mask(weight, torch.ones(32), 0.5)
    errors = [float((x @ weight.masked_fill(one, 0).T - x @ weight.T).norm()) for one in (mask, by_size)]
    assert errors[0] < errors[1]


def test_layers_with_outliers_keep_more():
    flat, peaked = torch.ones(1000), torch.ones(1000)
    peaked[:50] = 100
    found = owl_sparsity([flat, peaked, flat], 0.5)
    assert found[1] < 0.5 < found[0] == found[2] and abs(sum(found) / 3 - 0.5) < 1e-6
    assert max(found) - min(found) <= 0.16 + 1e-6
    assert owl_sparsity([flat, flat], 0.5) == [0.5, 0.5]


@pytest.mark.parametrize("owl", [False, True])
@torch.no_grad()
def test_every_expert_loses_its_share(owl, families, ids):
    model = families("mixtral")
    layers = view(model)
    with Collector(layers, {"x_sq", "inner_sq"}) as stats:
        model(input_ids=ids)
    starved = sparsify(layers, stats, 0.5, owl, least=10)
    assert {(one[0], one[1]) for one in starved} == {
        (place, expert)
        for place, count in enumerate(stats.values["count"])
        for expert in range(4)
        if count[expert] < 10
    }
    zeros = [float((stack == 0).float().mean()) for layer in layers for stack in layer.stacks().values()]
    assert all(abs(share - 0.5) < (0.12 if owl else 0.01) for share in zeros)
    del stats.values["x_sq"]
    with pytest.raises(UserError, match="needs the statistic 'x_sq'"):
        sparsify(layers, stats, 0.5)
