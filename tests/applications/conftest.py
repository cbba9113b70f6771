"""What the tests of the applications share: a small run of each, their command lines and their scores."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from unimoe.commands import main as cli


@pytest.fixture
def latents(tmp_path) -> dict:
    """Settings of a diffusion transformer on random latents of two classes."""
    random = np.random.default_rng(0)
    for name in ("features", "labels"):
        (tmp_path / name).mkdir()
    for place in range(60):
        image = random.normal(size=(1, 3, 4, 4)).astype(np.float32) * 0.1 + place % 2
        np.save(tmp_path / f"features/{place}.npy", image)
        np.save(tmp_path / f"labels/{place}.npy", np.array([place % 2]))
    dit = {"design": "promoe", "experts": 3, "patch": 2, "width": 16, "depth": 2, "heads": 2}
    return {
        "system": "diffusion",
        "output": str(tmp_path / "run"),
        "model": {"dit": dit, "lr": 0.001, "ema": 0.9},
        "data": {"train": str(tmp_path), "steps": 4, "batch_size": 16},
        "trainer": {"accelerator": "cpu"},
    }


@pytest.fixture
def feedback(tmp_path) -> dict:
    """Settings of HoME on users who like what has their number's parity."""
    random = np.random.default_rng(0)
    pairs = random.integers(9, size=(200, 2)).tolist()
    rows = [f"{user},{item},{(user + item) % 2}" for user, item in pairs]
    (tmp_path / "feedback.csv").write_text("\n".join(["user,item,like", *rows]) + "\n")
    return {
        "system": "recommendation",
        "output": str(tmp_path / "run"),
        "model": {"network": {"kind": "home", "parameters": 4000}, "embedding": 8, "lr": 0.01},
        "data": {
            "train": str(tmp_path / "feedback.csv"),
            "features": {"user": "id", "item": "id"},
            "tasks": {"good": {"like": "like"}, "bad": {"dislike": "like < 1"}},
            "steps": 4,
            "batch_size": 64,
        },
        "trainer": {"accelerator": "cpu"},
    }


@pytest.fixture
def squares(tmp_path) -> dict:
    """Settings of PSOD on images of one or two squares, each of which may be the salient one."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for place in range(60):
        folder = tmp_path / f"masks/{place}"
        folder.mkdir(parents=True)
        image = np.zeros((16, 16, 3), dtype=np.uint8)
        for number in range(1 + place % 2):
            row, column = random.integers(1, 5, size=2) + 6 * number
            mask = np.zeros((16, 16), dtype=np.uint8)
            mask[row : row + 5, column : column + 5] = 255
            image[mask > 0] = random.integers(100, 255, size=3)
            Image.fromarray(mask).save(folder / f"{number}.png")
        Image.fromarray(image).save(tmp_path / f"images/{place}.png")
    network = {"design": "psod", "width": 16, "depth": 2, "heads": 2}
    return {
        "system": "saliency",
        "output": str(tmp_path / "run"),
        "model": {"network": network, "lr": 0.001},
        "data": {"train": str(tmp_path), "side": 16, "steps": 4, "batch_size": 16},
        "trainer": {"accelerator": "cpu"},
    }


@pytest.fixture
def weather(tmp_path) -> dict:
    """Settings of MoFME on pairs of files: grey images, and noise or a veil over them."""
    random = np.random.default_rng(0)
    for place in range(24):
        kind = ("rain", "haze")[place % 2]
        clear = np.full((20, 33, 3), random.integers(40, 200))
        bad = clear + random.integers(0, 60, clear.shape) if kind == "rain" else clear // 2 + 100
        for name, image in (("gt", clear), ("input", bad)):
            path = tmp_path / "pairs" / name / kind / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    restorer = {"design": "mofme", "channels": 4, "width": 16, "depth": 2, "heads": 2}
    return {
        "system": "restoration",
        "output": str(tmp_path / "run"),
        "model": {"restorer": restorer, "lr": 0.003, "samples": 1},
        "data": {
            "train": str(tmp_path / "pairs"),
            "side": 16,
            "patches": 64,
            "val_share": 0.2,
            "test_share": 0.15,
            "steps": 4,
            "batch_size": 16,
        },
        "trainer": {"accelerator": "cpu"},
    }


@pytest.fixture
def styles(tmp_path) -> dict:
    """Settings of Meta-DMoE on red and blue squares, of which each domain has another background."""
    random = np.random.default_rng(0)
    splits = {"a": "train", "b": "train", "c": "train", "d": "val", "e": "test"}
    rows = ["filename,y,location_remapped,split"]
    (tmp_path / "styles/train").mkdir(parents=True)
    for number, (domain, split) in enumerate(splits.items()):
        for place in range(16):
            image = np.full((8, 8, 3), 50 * number, dtype=np.uint8)
            row, column = random.integers(4, size=2)
            image[row : row + 4, column : column + 4] = (200, 0, 0) if place % 2 else (0, 0, 200)
            Image.fromarray(image).save(tmp_path / f"styles/train/{domain}{place}.png")
            rows.append(f"{domain}{place}.png,{('blue', 'red')[place % 2]},{domain},{split}")
    (tmp_path / "styles/metadata.csv").write_text("\n".join(rows) + "\n")
    sizes = {"side": 8, "support": 4, "query": 4, "steps": 4, "batch_size": 4}
    return {
        "system": "adaptation",
        "output": str(tmp_path / "run"),
        "model": {"network": {"channels": 4, "heads": 2}, "lr": 0.001},
        "data": {"train": str(tmp_path / "styles"), **sizes},
        "trainer": {"accelerator": "cpu"},
    }


@pytest.fixture
def drawings(tmp_path) -> dict:
    """Settings of a unified model on red and blue squares."""
    random = np.random.default_rng(0)
    for place in range(60):
        image = np.full((8, 8, 3), 255, dtype=np.uint8)
        row, column = random.integers(4, size=2)
        image[row : row + 4, column : column + 4] = (200, 0, 0) if place % 2 else (0, 0, 200)
        path = tmp_path / "drawings" / ("blue", "red")[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    sizes = {"patch": 2, "width": 16, "depth": 3, "heads": 2, "inner": 32, "experts": 4, "k": 2}
    return {
        "system": "unified",
        "output": str(tmp_path / "base"),
        "model": {"unified": sizes, "lr": 0.001, "samples": 1},
        "data": {"train": str(tmp_path / "drawings"), "side": 8, "steps": 4, "batch_size": 16},
        "trainer": {"accelerator": "cpu"},
    }


@pytest.fixture
def adapted(drawings, command) -> dict:
    """Settings of its adaptation, after a run of it."""
    assert cli.main(command(drawings)) == 0
    model = {**drawings["model"], "adapt_from": drawings["output"]}
    model["unified"] = {**model["unified"], "design": "moe"}
    return {**drawings, "output": drawings["output"] + "_moe", "model": model}


@pytest.fixture
def command() -> Callable[..., list[str]]:
    """(settings, verb) -> arguments of ``unimoe``."""

    def write(settings: dict, verb: str = "fit") -> list[str]:
        path = Path(settings["output"]).with_suffix(".yaml")
        path.write_text(yaml.safe_dump(settings))
        return [verb, "-c", str(path)]

    return write


@pytest.fixture
def scores() -> Callable[[dict], dict]:
    """(settings) -> the scores of the test."""
    return lambda settings: json.loads((Path(settings["output"]) / "logs/test/scores.json").read_text())
