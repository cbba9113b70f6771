import logging

import pytest
import torch
from torch import nn

from unimoe.errors import UserError
from unimoe.training.resume import newest, remove
from unimoe.training.sharding import by_name, by_number


def write(path, step):
    torch.save({"global_step": step, "weights": torch.zeros(1000)}, path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    assert newest(last) is None
    write(last, 20)
    write(previous, 10)
    assert newest(last) == (last, 20)
    last.write_bytes(last.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert newest(last) == (previous, 10)
    assert "last.ckpt is damaged" in caplog.text and "of step 10" in caplog.text
    previous.write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.ckpt|previous\.ckpt"):
        newest(last)
    remove(last)
    assert newest(last) is None


def test_a_kill_between_two_renamings_leaves_the_one_before(tmp_path):
    write(tmp_path / "previous.ckpt", 10)
    assert newest(tmp_path / "last.ckpt") == (tmp_path / "previous.ckpt", 10)


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
