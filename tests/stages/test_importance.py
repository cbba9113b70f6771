from pathlib import Path

import pytest
import torch
import yaml

from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.moe.install import moe_layers
from unimoe.stages.assemble import assemble

IDS = torch.arange(10, 40).reshape(2, 15)


def write(path: Path, **content) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_units_are_dealt_out_by_what_was_measured(aligned, world, tmp_path):
    """With all experts and gates of zero, any order of the units is the dense model."""
    moe = {"preset": "sparse_unified", "router": {"k": 8, "init_std": 0.0}, "experts": {"slices": 8}}
    manifest = {"base": str(aligned), "experts": 1, "moe": moe}
    data = str(world / "train.jsonl")
    for name, more in {"weights": {}, "measured": {"importance": data}}.items():
        assemble(write(tmp_path / "m.yaml", **manifest, **more), output=str(tmp_path / name))
    models = [
        load_model(folder)[0].eval() for folder in (aligned, tmp_path / "weights", tmp_path / "measured")
    ]
    dense, *others = (model(IDS).logits for model in models)
    for logits in others:
        torch.testing.assert_close(logits, dense, rtol=1e-4, atol=1e-4)
    downs = [moe_layers(model)[0].experts.down_proj for model in models[1:]]
    assert not torch.equal(*downs)
    manifest |= {"moe": {}, "experts": 2}
    with pytest.raises(UserError, match="found experts of kind swiglu, expected importance; leave it out"):
        assemble(write(tmp_path / "m.yaml", **manifest, importance=data), output=str(tmp_path / "no"))
