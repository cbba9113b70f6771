import torch
from torch import nn
from torch.testing import assert_close

from unimoe.training.weight_average import WeightAverage


def test_early_averages_are_over_fewer_steps():
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = WeightAverage(model, decay=0.9)
    nn.init.ones_(model.weight)
    average.update(model, 1)
    assert_close(average.get_buffer("weight"), torch.full((1, 2), 1 - 1 / 11))
    average.update(model, 10_000)
    assert_close(average.get_buffer("weight"), torch.full((1, 2), 1 - 0.9 / 11))


def test_weights_come_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    average = WeightAverage(model, decay=0.9)
    assert list(average.state_dict()) == ["1/weight", "1/bias"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    with average.applied(model):
        assert model[1].weight.equal(before["1.weight"]) and model[0].weight.eq(1).all()
    assert all(p.eq(1).all() for p in model.parameters())
