import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from unimoe.stages.cli import main
from unimoe.testing import IMAGE, SPEECH, save_tiny_llm

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write_samples(root: Path) -> Path:
    """A few pictures, sounds and dialogues under ``root``; returns the file of samples."""
    random = np.random.default_rng(0)
    turns = []
    for index in range(6):
        name = list(COLOURS)[index % 3]
        Image.new("RGB", (64, 64), COLOURS[name]).save(root / f"{index}.png")
        turns.append(([{"type": "image", "path": f"{index}.png"}, {"type": "text", "text": "colour?"}], name))
    for index in range(3):
        soundfile.write(root / f"{index}.wav", 0.1 * random.normal(size=4000), 16000)
        turns.append(([{"type": "speech", "path": f"{index}.wav"}], "hello"))
    turns += [("hi", "good day"), ("bye", "see you")]
    lines = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in turns
    ]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root / "train.jsonl"


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny LLM in ``llm`` and samples in ``train.jsonl``."""
    root = tmp_path_factory.mktemp("world")
    save_tiny_llm(root / "llm")
    write_samples(root)
    return root


def align_settings(world: Path, output: Path) -> dict:
    return {
        "stage": "align",
        "output": str(output),
        "model": {
            "llm": str(world / "llm"),
            "modalities": {"image": IMAGE, "speech": SPEECH},
            "trainable": [{"match": "model.connectors.*", "lr": 1e-3}],
        },
        "data": {"train": str(world / "train.jsonl"), "steps": 3, "batch_size": 3},
    }


@pytest.fixture
def fit(tmp_path):
    """Run a stage in this process from settings given as a dictionary."""

    def run(settings: dict, *flags: str, verb: str = "fit"):
        path = tmp_path / f"{settings['stage']}.yaml"
        path.write_text(yaml.safe_dump(settings))
        main([verb, "-c", str(path), *flags])

    return run


@pytest.fixture
def align(world, tmp_path) -> dict:
    """Settings of a small alignment stage."""
    return align_settings(world, tmp_path / "align")


@pytest.fixture(scope="session")
def aligned(world, tmp_path_factory) -> Path:
    """The folder of a finished alignment stage."""
    root = tmp_path_factory.mktemp("aligned")
    settings = align_settings(world, root / "align")
    settings["model"]["warm_start"] = {"image": {}}
    settings["data"]["val"] = settings["data"]["train"]
    (root / "align.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "-c", str(root / "align.yaml")])
    return root / "align"


@pytest.fixture
def expert(world, aligned, tmp_path) -> dict:
    """Settings of a small expert stage."""
    return {
        "stage": "expert_image",
        "output": str(tmp_path / "expert"),
        "model": {
            "init_from": str(aligned),
            "save": "expert",
            "task": "pictures",
            "lora": [{"layers": "ffn", "rank": 4, "lr": 1e-2}],
        },
        "data": {"train": str(world / "train.jsonl"), "steps": 2, "batch_size": 3},
    }


@pytest.fixture(scope="session")
def expert_folder(world, aligned, tmp_path_factory) -> Path:
    """The folder of a finished expert."""
    root = tmp_path_factory.mktemp("expert")
    settings = {
        "stage": "expert_image",
        "output": str(root / "expert"),
        "model": {
            "init_from": str(aligned),
            "save": "expert",
            "task": "pictures",
            "trainable": [{"match": "model.connectors.image.*", "lr": 1e-2}],
            "lora": [{"layers": "ffn", "rank": 4, "lr": 1e-2}],
        },
        "data": {"train": str(world / "train.jsonl"), "steps": 2, "batch_size": 3},
    }
    (root / "expert.yaml").write_text(yaml.safe_dump(settings))
    main(["fit", "-c", str(root / "expert.yaml")])
    return root / "expert"


@pytest.fixture
def manifest(aligned, expert_folder, tmp_path) -> dict:
    """Of a mixture of the base's FFNs and an expert's, in every layer."""
    return {
        "base": str(aligned),
        "experts": [{"name": "words", "from": "base"}, {"name": "image", "from": str(expert_folder)}],
        "connectors": {"image": str(expert_folder)},
        "moe": {"top_k": 2, "placement": "all"},
        "output": str(tmp_path / "assembled"),
    }
