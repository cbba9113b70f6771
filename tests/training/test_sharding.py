import torch
from torch import nn

from unimoe.training.sharding import by_name, by_number


def test_optimizer_states_by_name_and_by_number():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    groups = [{"params": [module[1].weight, module[0].bias]}, {"params": [module[0].weight], "lr": 1.0}]
    optimizer = torch.optim.AdamW(groups)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    named = by_name(state, optimizer, module)
    assert named["param_groups"][0]["params"] == ["1.weight", "0.bias"]
    assert named["state"]["0.weight"]["exp_avg"].shape == (3, 2)
    assert by_number(named) == state
