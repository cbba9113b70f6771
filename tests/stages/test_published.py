"""The published Uni-MoE (configs/uni_moe/published), built without memory, against the paper's table 1.

The paper's totals are those of the LLM with its experts; towers and connectors come on top of them. What a
total is made of, in billions:

    0.262  embeddings and head, 2 x 32064 x 4096
    2.147  attention, 32 x 4 x 4096 x 4096
    4.329  FFNs, 32 x 3 x 4096 x 11008: 0.135 each
    6.738  LLaMA-7B, and 0.135 more for each further expert of a layer: 3 x 16 = 48 of them make 13.2

Active are all of it, with two experts of each MoE layer in place of 4 or 8. Routers (0.001) do not show.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlavaConfig

from unimoe.model.configuration import UniMoeConfig
from unimoe.model.convert import image_modality
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.moe import MoEConfig
from unimoe.moe.install import moe_layers
from unimoe.moe.settings import merge
from unimoe.stages.assemble import mixture as mixture_of
from unimoe.stages.assemble import read_manifest
from unimoe.stages.cli import main
from unimoe.stages.trainable import LoRA, Trainable, choose

FOLDER = Path(str(files("unimoe.configs").joinpath("uni_moe/published")))
STAGES = ("align", "expert_task2", "expert_task3", "expert_task7", "expert_task8", "moe")
SUCCESSOR = ("audio_warmup", "audio_joint")
FFN = 3 * 4096 * 11008


def stage(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def build(moe: dict[str, Any] | None, media: bool = True) -> UniMoeForConditionalGeneration:
    """The system on the meta device, as conversion, alignment and assembly would leave it."""
    llava = LlavaConfig()  # the defaults are LLaVA-1.5-7B
    modalities: dict[str, Any] = {}
    if media:
        modalities = {"image": image_modality(llava), **stage("align")["model"]["modalities"]}
        modalities |= stage("moe")["model"]["modalities"]
    for parts in modalities.values():
        for part in parts.values():
            part.pop("weights", None)
    if media:  # as a model's builder does
        modalities["video"]["connector"] |= {"frames": 8, "frame_positions": 576}
    llava.text_config.vocab_size = 32064  # of the published checkpoint
    with torch.device("meta"):
        return UniMoeForConditionalGeneration(
            UniMoeConfig(text_config=llava.text_config, modalities=modalities, moe=moe)
        )


def count(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def mixture(manifest: str, **changes: Any) -> dict[str, Any]:
    parsed = read_manifest(FOLDER / f"{manifest}.yaml")
    return MoEConfig.from_dict(merge(mixture_of(parsed).to_dict(), changes)).to_dict()


@pytest.mark.parametrize(
    ("manifest", "placement", "total", "active"),
    [
        ("assemble_4e", "interval", 13.2, 8.9),
        ("assemble_4e", "all", 19.7, 11.1),
        ("assemble_8e", "interval", 21.9, 8.9),
        ("assemble_8e", "all", 37.0, 11.1),
    ],
)
def test_parameters_are_those_of_the_papers_table(manifest, placement, total, active):
    model = build(mixture(manifest, placement=placement), media=False)
    layers = moe_layers(model).values()
    llm = count(model)
    experts = count(*(layer.experts for layer in layers))
    idle = sum((layer.experts.num_experts - 2) * FFN for layer in layers)
    routers = count(*(layer.router for layer in layers))
    dense_ffns = (32 - len(layers)) * FFN
    embeddings, attention, norms = 2 * 32064 * 4096, 32 * 4 * 4096**2, 65 * 4096
    assert llm == embeddings + attention + norms + dense_ffns + experts + routers
    assert routers < 2e6
    assert round(llm / 1e9, 1) == total
    assert round((llm - idle) / 1e9, 1) == active


@pytest.mark.parametrize(("placement", "first"), [("first_half", 0), ("second_half", 16)])
def test_other_placements_have_as_many_layers_as_interval(placement, first):
    layers = MoEConfig(**mixture("assemble_4e", placement=placement)).layers(32)
    assert layers == list(range(first, first + 16))
    assert len(layers) == len(MoEConfig(**mixture("assemble_4e")).layers(32))


def test_towers_connectors_and_what_they_give():
    model = build(None)
    encoders: Any = model.model.encoders
    connectors: Any = model.model.connectors
    # CLIP ViT-L/14-336: 576 positions of 1024; its last layer is not read, and so not built
    assert encoders["image"].num_tokens == 576 and encoders["image"].hidden_size == 1024
    assert len(encoders["image"].body.encoder.layers) == 23
    assert count(connectors["image"]) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    # 8 frames give as many tokens as a picture
    assert connectors["video"].num_tokens(encoders["video"].num_tokens(8)) == 576
    # whisper-small: 80 mel bins, 1500 positions of 768 in 30 s
    speech = encoders["speech"]
    assert (speech.num_mel_bins, speech.num_tokens(3000), speech.hidden_size) == (80, 1500, 768)
    assert round(count(speech) / 1e6, 1) == 87.0  # without its sinusoids, which are no parameters
    # whisper-small's decoder: 12 layers, 50 queries; and the projection
    assert round((count(connectors["speech"]) - 769 * 4096) / 1e6, 1) == 113.5
    assert connectors["speech"].num_tokens(1500) == connectors["audio"].num_tokens(1496) == 50


@pytest.mark.parametrize("name", [*STAGES, *SUCCESSOR])
def test_stages_are_read_by_the_command(name, capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(FOLDER / "base.yaml"), "-c", str(FOLDER / f"{name}.yaml"), "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["stage"], printed["model"]["schedule"], printed["model"]["warmup"]) == (
        name,
        "cosine",
        0.03,
    )
    assert (printed["data"]["max_length"], printed["checkpoint_every"]) == (2048, 1000)


@pytest.mark.parametrize(
    ("name", "samples", "epochs", "batch", "rates", "ranks"),
    [
        ("align", 1_894_000, 2, 32, [2e-5], []),
        ("expert_task2", 150_000, 1, 16, [4e-5, 4e-5], [64]),
        ("expert_task3", 150_000, 1, 16, [4e-5, 4e-5], [64]),
        ("expert_task7", 209_000, 1, 16, [4e-5, 4e-5], [64]),
        ("expert_task8", 203_000, 1, 16, [3e-5, 4e-4], [64]),
        ("moe", 459_000, 2, 8, [4e-5] * 4, [8, 8]),
    ],
)
def test_rates_ranks_and_batches_are_the_papers(name, samples, epochs, batch, rates, ranks):
    settings = stage(name)
    model, data = settings["model"], settings["data"]
    assert [entry["lr"] for entry in model["trainable"] + model.get("lora", [])] == rates
    assert [entry["rank"] for entry in model.get("lora", [])] == ranks
    assert all(entry["alpha"] == 16 for entry in model.get("lora", []))
    devices = 2 if name == "align" else 1
    assert (
        data["batch_size"] * devices * settings.get("trainer", {}).get("accumulate_grad_batches", 1) == batch
    )
    assert data["steps"] == -(-samples * epochs // batch)


FFN_LORA = 32 * 64 * 3 * (4096 + 11008)


@pytest.mark.parametrize(
    ("name", "connectors", "adapters"),
    [
        ("align", ["speech", "audio"], 0),
        ("expert_task2", ["image"], FFN_LORA),
        ("expert_task3", ["image", "speech"], FFN_LORA),
    ],
)
def test_dense_stages_train_what_the_paper_trains(name, connectors, adapters):
    model, settings = build(None), stage(name)["model"]
    wanted = count(*(model.model.connectors[kind] for kind in connectors))
    groups = trained(model, settings)
    assert [group.size() for group in groups] == [wanted, *([adapters] if adapters else [])]


def test_the_last_stage_trains_what_the_paper_trains():
    model, settings = build(mixture("assemble_4e")), stage("moe")["model"]
    projector = count(model.model.connectors["image"])
    routers, connectors, attention, experts = (group.size() for group in trained(model, settings))
    assert routers == 16 * 4 * 4096
    assert connectors == 2 * projector + 2 * 769 * 4096  # pictures and frames, speech and sound
    assert attention == 32 * 4 * 8 * 2 * 4096
    gate_up, down = 8 * (4096 + 2 * 11008), 8 * (11008 + 4096)  # gate and up share their A
    assert experts == 16 * 4 * (gate_up + down)


def trained(model: Any, settings: dict[str, Any]) -> list[Any]:
    full = [Trainable(**entry) for entry in settings["trainable"]]
    with torch.device("meta"):
        return choose(model, full, [LoRA(**entry) for entry in settings.get("lora", [])])


def test_the_successors_mixture_and_its_warm_up():
    """8 routed experts of half width, a null one, 2 shared ones; first only what is new learns."""
    model = build(mixture("audio_assemble"), media=False)
    layer = moe_layers(model)[0]
    assert (layer.experts.num_experts, layer.experts.intermediate_size) == (8, 5504)
    assert layer.router.weight.shape == (8 + 1 + 2, 4096)
    assert layer.shared.gate_up_proj.shape == (2, 2 * 2752, 4096)
    (group,) = trained(model, stage("audio_warmup")["model"])
    assert group.size() == 32 * (11 * 4096 + 2 * 3 * 2752 * 4096)
