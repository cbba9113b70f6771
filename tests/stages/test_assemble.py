import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.moe.install import moe_layers
from unimoe.stages.assemble import assemble
from unimoe.stages.experts_file import ffn_tensors, load_connectors, load_expert, save_expert
from unimoe.testing import save_tiny_llm, tiny_model

IDS = torch.arange(10, 40).reshape(2, 15)


def write(path: Path, **content) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_slots_hold_what_the_manifest_says(manifest, aligned, expert_folder, tmp_path):
    assemble(write(tmp_path / "m.yaml", **manifest))
    model, _ = load_model(tmp_path / "assembled")
    dense, learned = ffn_tensors(load_model(aligned)[0]), load_expert(expert_folder).tensors
    layers: dict[int, Any] = moe_layers(model)  # type: ignore[assignment]
    assert list(layers) == [0, 1]
    for index, layer in layers.items():
        for slot, source in enumerate((dense, learned)):
            assert torch.equal(layer.experts.gate_up_proj[slot], source[f"layers.{index}.gate_up_proj"])
            assert torch.equal(layer.experts.down_proj[slot], source[f"layers.{index}.down_proj"])
        assert 0 < layer.router.weight.std() < 0.04
    connectors = model.model.connectors
    for kind, folder in (("image", expert_folder), ("speech", aligned)):
        for name, tensor in load_connectors(folder, kind).items():
            assert torch.equal(connectors[kind].state_dict()[name], tensor)
    record = json.loads((tmp_path / "assembled" / "stage.json").read_text())
    assert {parent["folder"] for parent in record["parents"]} == {str(aligned), str(expert_folder)}
    kept = yaml.safe_load((tmp_path / "assembled" / "manifest.yaml").read_text())
    assert all(len(entry["sha256"]) == 64 for entry in kept["sha256"])


def test_specialists_may_become_experts_of_any_kind(manifest, expert_folder, tmp_path):
    """In a latent space of the whole hidden size, a slot still computes what its specialist does."""
    manifest["moe"] = {"experts": {"kind": "latent_space", "size": 32}}
    assemble(write(tmp_path / "m.yaml", **manifest))
    layer: Any = moe_layers(load_model(tmp_path / "assembled")[0])[0]
    found = layer.experts.inner.gate_up_proj[1] @ layer.experts.down
    assert torch.allclose(found, load_expert(expert_folder).tensors["layers.0.gate_up_proj"], atol=1e-5)


def test_copies_answer_as_the_dense_model(aligned, tmp_path):
    assemble(write(tmp_path / "m.yaml", base=str(aligned), experts=4), output=str(tmp_path / "moe"))
    dense, sparse = load_model(aligned)[0].eval(), load_model(tmp_path / "moe")[0].eval()
    assert (sparse.config.moe or {})["experts"]["copies"] == 4
    torch.testing.assert_close(sparse(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_command_line_overrides_the_mixture(manifest, tmp_path):
    path = write(tmp_path / "m.yaml", **manifest)
    assemble(path, moe=["placement=[1]", "router.gating=softmax_topk", "router.renormalize=false"])
    model, _ = load_model(tmp_path / "assembled")
    assert list(moe_layers(model)) == [1]
    router = (model.config.moe or {})["router"]
    assert (router["gating"], router["renormalize"], router["k"]) == ("softmax_topk", False, 2)
    with pytest.raises(UserError, match="--moe num_experts=2: expected KEY=VALUE"):
        assemble(path, moe=["num_experts=2"])


def test_specialists_are_split(manifest, expert_folder, tmp_path):
    """Two slots in two slices, top-p with a null and a shared expert, saved and loaded."""
    manifest["moe"] |= {
        "slices": 2,
        "router": "top_p",
        "null_experts": 1,
        "shared_experts": 1,
        "shared_size": 8,
    }
    path = write(tmp_path / "m.yaml", **manifest)
    assemble(path)
    model, _ = load_model(tmp_path / "assembled")
    learned = load_expert(expert_folder).tensors
    layer: Any = moe_layers(model)[1]
    assert (layer.experts.num_experts, layer.router.num_experts, len(layer.router.weight)) == (4, 5, 6)
    down = torch.cat([layer.experts.down_proj[2], layer.experts.down_proj[3]], dim=1)
    assert torch.equal(down, learned["layers.1.down_proj"])
    assert model(IDS).logits.isfinite().all()
    for slot in manifest["experts"]:
        slot["data"] = "words.jsonl"
    with pytest.raises(UserError, match="need moe.experts.slices 1"):
        assemble(write(tmp_path / "m.yaml", **manifest))


def test_what_no_layer_takes_up_is_said(manifest, tmp_path, caplog):
    assemble(write(tmp_path / "m.yaml", **manifest))
    assert "dropped" not in caplog.text
    manifest["moe"]["placement"] = "interval"
    assemble(write(tmp_path / "m.yaml", **manifest), output=str(tmp_path / "other"))
    assert "1 of its trained layers are not placed as MoE layers and are dropped" in caplog.text


def test_a_mixture_is_no_base(manifest, tmp_path):
    path = write(tmp_path / "m.yaml", **manifest)
    assemble(path)
    manifest["base"] = manifest["output"]
    with pytest.raises(UserError, match="is a mixture of experts already"):
        assemble(write(tmp_path / "m.yaml", **manifest), output=str(tmp_path / "again"))


def test_routers_come_from_the_seed(aligned, tmp_path):
    routers = []
    for seed in (0, 0, 1):
        out = tmp_path / f"moe{len(routers)}"
        assemble(write(tmp_path / "m.yaml", base=str(aligned), experts=2, seed=seed), output=str(out))
        routers.append(moe_layers(load_model(out)[0])[0].router.get_parameter("weight"))
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


def test_the_same_manifest_again(manifest, tmp_path, caplog):
    path = write(tmp_path / "m.yaml", **manifest)
    assemble(path)
    caplog.set_level(logging.INFO)
    assemble(path)
    assert "is finished" in caplog.text
    manifest["seed"] = 3
    path = write(tmp_path / "m.yaml", **manifest)
    with pytest.raises(UserError, match="seed: there 0, now 3"):
        assemble(path)
    assemble(path, overwrite=True)


def test_expert_of_another_shape(manifest, tmp_path):
    save_tiny_llm(tmp_path / "llm", hidden_size=64)
    other, _ = tiny_model(tmp_path)
    (tmp_path / "other").mkdir()
    save_expert(tmp_path / "other", other, "x", "stage", "task")
    manifest["experts"][1]["from"] = str(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"layers\.0\.gate_up_proj has shape \[256, 64\], expected \[128, 32\]"
    ):
        assemble(write(tmp_path / "m.yaml", **manifest))
    assert not (tmp_path / "assembled").exists()


def test_expert_of_another_llm(manifest, aligned, tmp_path):
    model, _ = load_model(aligned)
    (tmp_path / "other").mkdir()
    save_expert(tmp_path / "other", model, "f" * 64, "stage", "task")
    manifest["experts"][1]["from"] = str(tmp_path / "other")
    with pytest.raises(UserError, match="another LLM: fingerprint ffffffffffff, expected"):
        assemble(write(tmp_path / "m.yaml", **manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert": []}, "unknown key 'expert'"),
        ({"experts": []}, "experts must be"),
        ({"experts": [{"name": "a"}]}, r"experts\[0\] must be"),
        ({"experts": [{"from": "base", "weight": 1}]}, "unknown key 'weight'"),
        ({"experts": [{"from": "nowhere"}]}, "nowhere, which is not a folder"),
        ({"base": None}, "base must name"),
        ({"base": "nowhere"}, "nowhere does not exist"),
        ({"moe": {"num_experts": 2}}, "follows from experts"),
        ({"moe": {"topk": 2}}, "unknown key 'topk'"),
        ({"moe": {"top_k": 3}}, "moe.router.k is 3"),
        ({"connectors": {"audio": "SELF"}}, "the base has no audio"),
        ({"connectors": ["image"]}, "connectors must be of type dict"),
        ({"output": None}, "an output folder is missing: output: FOLDER, or --output"),
    ],
)
def test_bad_manifests(manifest, aligned, tmp_path, change, message):
    text = yaml.safe_dump({**manifest, **change}).replace("SELF", str(aligned))
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        assemble(str(tmp_path / "m.yaml"))
    assert not (tmp_path / "assembled").exists()


def test_unreadable_manifest(tmp_path):
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        assemble(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        assemble(str(tmp_path / "bad.yaml"))
