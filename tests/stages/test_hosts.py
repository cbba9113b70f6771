"""Stages on multimodal models of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from transformers import AutoModelForMultimodalLM

from unimoe.errors import UserError
from unimoe.model.loss import moe_settings
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig
from unimoe.moe.install import moe_layers
from unimoe.testing import assert_same_run, run_together
from unimoe.testing_hosts import FAMILIES, MIXTURES
from unimoe.training.curve import read_curve
from unimoe.training.resume import latest_checkpoint

FIT = """
import sys
from unimoe.stages.cli import main
for path in sys.argv[1:]:
    main(["fit", "-c", path])
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A folder with an upcycled model in ``moe``, its dense start in ``dense``, and samples."""
    root = tmp_path_factory.mktemp("host")
    lines = []
    for index, colour in enumerate(("red", "green", "blue", "red")):
        Image.new("RGB", (28, 28 * (1 + index % 2)), colour).save(root / f"{index}.png")
        asked = [{"type": "image", "path": f"{index}.png"}, {"type": "text", "text": "colour?"}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
        lines.append(json.dumps({"messages": turns}))
    (root / "train.jsonl").write_text("\n".join(lines))
    for kind in ("dense", "moe"):
        model, processor = FAMILIES["qwen2_5_vl"][0]()
        if kind == "moe":
            torch.manual_seed(0)
            upcycle_model(model, MoEConfig.for_upcycling({"experts": {"copies": 4}}))
        model.save_pretrained(root / kind)
        processor.save_pretrained(root / kind)
    return root


def settings(host, tmp_path, kind="moe", **model):
    return {
        "stage": "moe",
        "output": str(tmp_path / "out"),
        "model": {"init_from": str(host / kind), **model},
        "data": {"train": str(host / "train.jsonl"), "steps": 3, "batch_size": 2},
    }


def test_a_moe_stage_trains_and_leaves_a_stock_folder(host, fit, tmp_path):
    chosen = settings(
        host,
        tmp_path,
        trainable=[{"match": "*.mlp.router.*", "lr": 1e-2}, {"match": "*visual*", "lr": 1e-3}],
        lora=[{"layers": "attention", "rank": 2}, {"layers": "experts", "rank": 2}],
        gradient_checkpointing=True,
        anneal={"balance": {"start": 0.1, "end": 0.0, "steps": 2}},
    )
    chosen["data"]["batch_size"] = 4
    fit(chosen)
    found = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    start = AutoModelForMultimodalLM.from_pretrained(host / "moe")
    moved = {
        name.split(".layers.")[-1]
        for (name, one), other in zip(found.named_parameters(), start.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert {"0.mlp.router.weight", "0.mlp.experts.down_proj", "1.self_attn.q_proj.weight"} <= moved
    assert "1.mlp.down_proj.weight" not in moved and len(moe_layers(found)) == 1
    kept = moe_settings(found)
    assert kept is not None and kept["losses"]["balance"] == 0.0
    rows = read_curve(tmp_path / "out" / "logs" / "metrics.csv")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert "Trained by `unimoe fit`: stage moe, 3 steps." in (tmp_path / "out" / "README.md").read_text()


def write_samples(folder, kinds):
    """One sample with a sound, a video or an image for each of ``kinds``."""
    Image.new("RGB", (28, 28), "red").save(folder / "0.png")
    soundfile.write(folder / "0.wav", np.random.default_rng(0).normal(size=8000) / 4, 16000)
    paths = {"image": "0.png", "audio": "0.wav", "video": ["0.png"] * 4}
    lines = []
    for kind in kinds:
        asked = [{"type": kind, "path": paths[kind]}, {"type": "text", "text": "what?"}]
        lines.append(
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a"}]}
        )
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))


def killed(chosen, folder, step):
    """Run a stage in a process that is killed at a step; returns the step of its checkpoint."""
    dies = {"class_path": "unimoe.testing.DieAt", "init_args": {"step": step, "rank": 0}}
    (folder / "dies.yaml").write_text(yaml.safe_dump(chosen | {"trainer": {"callbacks": [dies]}}))
    with pytest.raises(RuntimeError, match="exit codes: -9$"):
        run_together(1, FIT, str(folder / "dies.yaml"))
    found = latest_checkpoint(Path(chosen["output"], "checkpoints", "last.ckpt"))
    return found[1] if found else 0


def upcycled(name, folder):
    """A model of a family with two experts, and settings of a stage that trains them on a sample of each of
    its modalities."""
    write_samples(folder, FAMILIES[name][1])
    model, processor = FAMILIES[name][0]()
    upcycle_model(model, MoEConfig.for_upcycling({"experts": {"copies": 2}}))
    for part in (model, processor):
        part.save_pretrained(folder / "moe")
    return model, settings(folder, folder, lora=[{"layers": "experts", "rank": 2, "lr": 1e-2}])


def assert_experts_moved(folder, start):
    found = AutoModelForMultimodalLM.from_pretrained(folder)
    weights = [moe_layers(one)[0].experts.down_proj for one in (found, start)]
    assert not torch.equal(*weights)


def test_another_family_trains_a_stage(fit, tmp_path):
    model, chosen = upcycled("qwen2_audio", tmp_path)
    fit(chosen)
    assert_experts_moved(tmp_path / "out", model)


SEVEN = ["qwen2_audio", "qwen2_5_omni", "internvl", "llava_onevision", "qwen3_vl", "llava", "gemma3"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVEN)
def test_other_families_train_a_stage_and_kill_9_changes_nothing(name, fit, tmp_path):
    """Sound, video, and images, one after another."""
    model, chosen = upcycled(name, tmp_path)
    chosen |= {"checkpoint_every": 1}
    assert 1 <= killed(chosen | {"output": str(tmp_path / "killed")}, tmp_path, 3) < 3
    fit(chosen)
    fit(chosen | {"output": str(tmp_path / "killed")})
    assert_same_run(tmp_path / "killed", tmp_path / "out")
    assert_experts_moved(tmp_path / "out", model)


def test_a_mixture_of_transformers_trains_a_stage(fit, tmp_path):
    """Adapters on its attention, and all weights of its own experts and routers."""
    write_samples(tmp_path, ["image", "video"])
    model, processor = MIXTURES["qwen3_vl_moe"]()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "moe")
    trainable = [{"match": ["*.mlp.experts.*", "*.mlp.gate.*"], "lr": 1e-2}]
    fit(settings(tmp_path, tmp_path, trainable=trainable, lora=[{"layers": "attention", "rank": 2}]))
    found = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    moved = {
        name.split(".layers.")[-1]
        for (name, one), other in zip(found.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert {"0.mlp.experts.down_proj", "1.mlp.gate.weight", "1.self_attn.q_proj.weight"} <= moved


def test_images_for_a_model_that_takes_none_are_named(fit, host, world, tmp_path):
    for part in FAMILIES["qwen2_audio"][0]():
        part.save_pretrained(tmp_path / "blind")
    chosen = settings(host, tmp_path, lora=[{"layers": "attention"}])
    chosen["model"]["init_from"] = str(tmp_path / "blind")
    with pytest.raises(UserError, match="train.jsonl:.*this model takes no image; it takes text, "):
        fit(chosen)
    chosen["model"]["init_from"] = str(world / "llm")
    with pytest.raises(UserError, match="llm holds a model of type 'llama', expected 'unimoe' or "):
        fit(chosen)


@pytest.mark.slow
def test_kill_9_changes_nothing(host, fit, tmp_path):
    chosen = settings(
        host,
        tmp_path,
        trainable=[{"match": "*.mlp.router.*", "lr": 1e-2}],
        lora=[{"layers": "attention", "rank": 2, "dropout": 0.2}, {"layers": "experts", "rank": 2}],
    ) | {"checkpoint_every": 1}
    chosen["data"]["steps"] = 5
    fit(chosen | {"output": str(tmp_path / "whole")})
    again = chosen | {"output": str(tmp_path / "killed")}
    assert 1 <= killed(again, tmp_path, 3) < 5
    fit(again)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_train_as_one(host, tmp_path):
    """With all of the model, half of its weights, and half of its experts."""
    fsdp2 = "unimoe.training.sharding.FSDP2Strategy"
    divided = {"class_path": fsdp2, "init_args": {"expert_parallel": 2}}
    runs = {}
    for name, strategy in {"alone": "auto", "ddp": "ddp", "fsdp2": "fsdp2", "experts": divided}.items():
        ranks = 1 if name == "alone" else 2
        runs[name] = settings(
            host,
            tmp_path,
            trainable=[{"match": "*.mlp.router.*", "lr": 1e-3}, {"match": "*visual*", "lr": 1e-4}],
            lora=[{"layers": "attention", "rank": 2}, {"layers": "experts", "rank": 2}],
            gradient_checkpointing=name == "fsdp2",
        ) | {
            "output": str(tmp_path / name),
            "trainer": {"accelerator": "cpu", "devices": ranks, "strategy": strategy},
        }
        runs[name]["data"] |= {"batch_size": 4 // ranks}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(runs[name]))
    run_together(1, FIT, str(tmp_path / "alone.yaml"))
    run_together(2, FIT, *(str(tmp_path / f"{name}.yaml") for name in ("ddp", "fsdp2", "experts")))
    for name in ("ddp", "fsdp2", "experts"):
        assert_same_run(tmp_path / name, tmp_path / "alone")
    assert AutoModelForMultimodalLM.from_pretrained(tmp_path / "experts").get_decoder() is not None


def test_the_dense_control_trains_too_on_packed_samples(host, fit, tmp_path):
    chosen = settings(host, tmp_path, "dense", lora=[{"layers": "ffn", "rank": 2}])
    chosen["data"]["pack"] = 128
    fit(chosen)
    found = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    start = AutoModelForMultimodalLM.from_pretrained(host / "dense")
    ffn = [one.get_decoder().layers[1].mlp.up_proj.weight for one in (found, start)]
    assert not torch.equal(*ffn)


def curve(folder):
    rows = read_curve(folder / "logs" / "metrics.csv")
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "idefics3"])
def test_cached_features_do_not_change_a_stage(name, host, fit, tmp_path):
    for part in FAMILIES[name][0]():
        part.save_pretrained(tmp_path / "dense")
    chosen = settings(host, tmp_path, lora=[{"layers": "attention", "rank": 2, "lr": 1e-2}])
    chosen["model"]["init_from"] = str(tmp_path / "dense")
    chosen["data"]["steps"] = 2
    fit(chosen | {"output": str(tmp_path / "plain")})
    chosen["data"]["cache_features"] = str(tmp_path / "features")
    for output in ("cached", "again")[: 1 + (name == "qwen2_5_vl")]:
        fit(chosen | {"output": str(tmp_path / output)})
        # losses of about 5 in float32; the tower saw other batches
        assert curve(tmp_path / output) == pytest.approx(curve(tmp_path / "plain"), rel=1e-6)
    assert len(list((tmp_path / "features").iterdir())) == 1  # the second run encoded nothing


def test_features_of_a_tower_that_trains_are_not_cached(host, fit, tmp_path):
    chosen = settings(host, tmp_path, trainable=[{"match": "*visual.merger*", "lr": 1e-3}])
    chosen["data"]["cache_features"] = True
    with pytest.raises(UserError, match="data.cache_features: .* trains, whose outputs change"):
        fit(chosen)


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("model", {"save": "expert"}, "is saved whole"),
        ("model", {"warm_start": {"image": {}}}, "warm_start: .* brings trained connectors"),
        ("model", {"modalities": {"image": {}}}, "model.modalities: .* has its own"),
    ],
)
def test_what_a_host_cannot_do_is_said(host, fit, tmp_path, place, value, message):
    chosen = settings(host, tmp_path, lora=[{"layers": "attention"}])
    chosen[place] |= value
    with pytest.raises(UserError, match=message):
        fit(chosen)
