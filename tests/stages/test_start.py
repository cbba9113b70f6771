import json
from pathlib import Path

import pytest
import torch

from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.stages.module import StageModule
from unimoe.testing import BEATS


@pytest.fixture
def hearing(world, aligned, fit, tmp_path) -> Path:
    """A further stage of the aligned model, which gets a sound tower and trains its connector."""
    lines = []
    for index in range(3):
        heard = {"role": "user", "content": [{"type": "audio", "path": str(world / f"{index}.wav")}]}
        lines.append(json.dumps({"messages": [heard, {"role": "assistant", "content": "rain"}]}))
    (tmp_path / "sounds.jsonl").write_text("\n".join(lines))
    fit(
        {
            "stage": "align_audio",
            "output": str(tmp_path / "hearing"),
            "model": {
                "init_from": str(aligned),
                "modalities": {"audio": BEATS},
                "trainable": [{"match": "model.connectors.audio.*", "lr": 1e-2}],
            },
            "data": {"train": str(tmp_path / "sounds.jsonl"), "steps": 2, "batch_size": 2},
        }
    )
    return tmp_path / "hearing"


def test_one_start_only():
    with pytest.raises(UserError, match="one of"):
        StageModule()
    with pytest.raises(UserError, match="belongs to a fresh start"):
        StageModule(init_from="a", moe={"num_experts": 2})


def test_wrong_init_from(align, expert, expert_folder, world, fit, tmp_path):
    for folder, message in (
        (world, "no config.json"),
        (world / "llm", "type 'llama', expected 'unimoe'"),
        (expert_folder, "holds one expert"),
        (world / "train.jsonl", "is a file"),
    ):
        expert["model"]["init_from"] = str(folder)
        with pytest.raises(UserError, match=message):
            fit(expert)
    assert not (tmp_path / "expert").exists()


def test_a_medium_is_added_between_stages(aligned, hearing):
    before, _ = load_model(aligned, device="cpu")
    after, processor = load_model(hearing, device="cpu")
    assert set(processor.modalities) == {"image", "speech", "audio"}
    old, new = before.state_dict(), after.state_dict()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert {name.split(".")[2] for name in new.keys() - old.keys()} == {"audio"}
