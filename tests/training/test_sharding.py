from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, install_moe
from unimoe.training import sharding
from unimoe.training.sharding import FSDP2Strategy, by_name, by_number, check_deepspeed, shard


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


@pytest.mark.parametrize(
    "moe",
    [
        {"router": {"kind": "top_k", "k": 1}, "experts": {"kind": "pool", "copies": 2}},
        {"router": {"kind": "recurrent", "cell": "gru", "size": 4, "share": True}, "experts": {"copies": 2}},
    ],
)
def test_parts_that_use_other_layers_are_refused(moe):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model: Any = AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes))
    install_moe(model, MoEConfig.from_dict({**moe, "placement": "all"}))
    model.trainer = SimpleNamespace(strategy=FSDP2Strategy.__new__(FSDP2Strategy))
    with pytest.raises(UserError, match="uses weights of other layers.*train with strategy ddp"):
        shard(model, model.layers)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(sharding, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"stage_2 needs an extra: pip install 'unimoe\[deepspeed\]'"):
        check_deepspeed("deepspeed_stage_2")
    for other in ("ddp", "fsdp2", "auto"):
        check_deepspeed(other)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra: unimoe[deepspeed]")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA devices")
def test_on_a_cpu():
    with pytest.raises(UserError, match="deepspeed_stage_2 runs on CUDA devices only"):
        check_deepspeed("deepspeed_stage_2")
    with pytest.raises(UserError, match="deepspeed_stage_3 leaves no whole weights"):
        check_deepspeed("deepspeed_stage_3")
