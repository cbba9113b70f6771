from dataclasses import replace

import pytest
import torch

from unimoe.compare import run
from unimoe.compare.base import open_base
from unimoe.compare.config import CompareConfig, DataConfig
from unimoe.errors import UserError


def test_a_mixture_is_no_base(tiny_folder, tmp_path):
    data = DataConfig(train={str(tmp_path / "train.jsonl"): 1}, val=[str(tmp_path / "train.jsonl")])
    settings = {"placement": [1], "steps": 2, "batch_size": 2, "seeds": [0], "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="is a mixture of experts; designs need a dense model"):
        open_base(CompareConfig(data=data, designs=[], base=str(tiny_folder), match="none", **settings))


def test_designs_from_scratch_share_all_but_independent_experts(small):
    config = small()
    base = open_base(config)
    dense, copies = (run._ready(one, base, config) for one in run.read_designs([], "all"))
    plain, sparse = base.build(dense, 3), base.build(copies, 3)
    shared = dict(plain.named_parameters())
    same = [
        name
        for name, weight in sparse.named_parameters()
        if name in shared and torch.equal(weight, shared[name])
    ]
    assert any("q_proj" in name for name in same) and any("embed" in name for name in same)
    assert not any(".mlp." in name for name in same) and len(same) == len(
        [name for name in shared if ".mlp." not in name]
    )
    experts = sparse.model.language_model.layers[0].mlp.experts.gate_up_proj
    distances = torch.cdist(experts.flatten(1), experts.flatten(1))
    assert distances[~torch.eye(4, dtype=torch.bool)].min() > 1
    assert float(experts.detach().std()) == pytest.approx(0.02, rel=0.05)
    other = base.build(replace(copies, name="again"), 4)
    assert not torch.equal(other.get_input_embeddings().weight, plain.get_input_embeddings().weight)
