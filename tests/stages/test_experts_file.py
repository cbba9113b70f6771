import json

import pytest
import torch

from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.stages.experts_file import (
    base_fingerprint,
    ffn_tensors,
    load_connectors,
    load_expert,
    save_expert,
)
from unimoe.testing import tiny_model


def test_an_expert_stage_leaves_ffns_and_connectors(aligned, expert_folder):
    expert = load_expert(expert_folder)
    base, _ = load_model(aligned)
    own = ffn_tensors(base)
    assert expert.info.task == "pictures"
    assert expert.info.base_llm == base_fingerprint(base)
    assert {name: t.shape for name, t in expert.tensors.items()} == {name: t.shape for name, t in own.items()}
    assert all(not torch.equal(tensor, own[name]) for name, tensor in expert.tensors.items())
    learned, before = load_connectors(expert_folder, "image"), load_connectors(aligned, "image")
    assert learned.keys() == before.keys()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in learned.items())
    record = json.loads((expert_folder / "stage.json").read_text())
    assert record["parents"][0]["stage"] == "align"
    assert not (expert_folder / "model.safetensors").exists()


def test_fingerprint_is_of_the_llm_without_ffns(tmp_path):
    model, _ = tiny_model(tmp_path)
    before = base_fingerprint(model)
    decoder = model.model.language_model
    with torch.no_grad():
        decoder.layers[0].mlp.up_proj.weight.add_(1)
        decoder.embed_tokens.weight.add_(1)
    assert base_fingerprint(model) == before
    with torch.no_grad():
        decoder.layers[0].self_attn.q_proj.weight.add_(1)
    assert base_fingerprint(model) != before


def test_folders_that_are_no_experts(tmp_path, aligned):
    with pytest.raises(UserError, match="no expert.json"):
        load_expert(aligned)
    model, _ = tiny_model(tmp_path)
    save_expert(tmp_path, model, "x", "stage", "task")
    load_expert(tmp_path)
    content = bytearray((tmp_path / "expert.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "expert.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not what expert.json describes"):
        load_expert(tmp_path)
    (tmp_path / "expert.json").write_text('{"format": 7}')
    with pytest.raises(UserError, match="cannot be read"):
        load_expert(tmp_path)


def test_connectors_that_are_not_there(tmp_path, expert_folder):
    with pytest.raises(UserError, match="holds no audio connector"):
        load_connectors(expert_folder, "audio")
    with pytest.raises(UserError, match="neither an expert folder nor a model folder"):
        load_connectors(tmp_path, "image")
