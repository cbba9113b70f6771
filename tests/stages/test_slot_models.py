import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.stages.assemble import assemble


def write(path: Path, **content) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_the_rest_of_specialists_may_be_averaged(aligned, tmp_path):
    """BAM from the base and a model that differs everywhere: experts are theirs, the rest is the mean."""
    other, processor = load_model(aligned)
    with torch.no_grad():
        for parameter in other.model.language_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    slots = [{"from": "base"}, {"from": str(tmp_path / "other")}]
    moe = {"attention": {"kv": "shared"}, "placement": [1]}
    manifest = {"base": str(aligned), "experts": slots, "moe": moe, "average": True}
    assemble(write(tmp_path / "m.yaml", **manifest), output=str(tmp_path / "bam"))
    own, found = load_model(aligned)[0], load_model(tmp_path / "bam")[0]
    decoders: list[Any] = [one.model.language_model for one in (own, other, found)]
    for layer in (0, 1):
        weights = [one.layers[layer].input_layernorm.weight for one in decoders]
        torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2)
    experts = decoders[2].layers[1].mlp.experts
    for slot in (0, 1):
        assert torch.equal(experts.down_proj[slot], decoders[slot].layers[1].mlp.down_proj.weight)
    attention = decoders[2].layers[1].self_attn
    width = decoders[0].layers[1].self_attn.q_proj.weight.shape[0]
    assert attention.attention.q_proj.weight.shape[0] == 2 * width
    keys = [one.layers[1].self_attn.k_proj.weight for one in decoders[:2]]
    torch.testing.assert_close(attention.attention.k_proj.weight, (keys[0] + keys[1]) / 2)


def test_a_model_of_other_layers_is_no_slot(aligned, tmp_path):
    other, processor = load_model(aligned)
    layers: Any = other.model.language_model.layers
    layers.append(copy.deepcopy(layers[0]))
    other.config.text_config.num_hidden_layers += 1
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    slots = [{"from": "base"}, {"from": str(tmp_path / "other")}]
    manifest = write(tmp_path / "m.yaml", base=str(aligned), experts=slots)
    with pytest.raises(UserError, match=r"experts\[1\]: .*other is of 3 layers, expected a dense model of 2"):
        assemble(manifest, output=str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()
