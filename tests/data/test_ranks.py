"""An epoch of a mixture over two processes, counted where it happens: in the collator and in the towers."""

import json
from collections import Counter

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from unimoe.testing import IMAGE, SPEECH, run_together, save_tiny_llm

COUNT = """
import json, sys
from torch.nn.modules.module import register_module_forward_hook
from unimoe.data import Collator
from unimoe.encoders import Encoder
from unimoe.stages.cli import main
steps, collate = [], Collator.bucket_by_length
def counted(self, samples):
    steps.append({"ids": [sample.id for sample in samples], "towers": []})
    return collate(self, samples)
Collator.bucket_by_length = counted
def ran(module, inputs, output):
    if isinstance(module, Encoder):
        steps[-1]["towers"].append(module.modality)
register_module_forward_hook(ran)
main(["fit", "-c", sys.argv[1]])
print("counted", json.dumps(steps))
"""

COUNTS = {"image": 7, "speech": 4, "text": 6}


@pytest.fixture
def files(tmp_path) -> list[str]:
    """One file of samples for each modality."""
    sound = 0.1 * np.random.default_rng(0).normal(size=4000)
    for kind, count in COUNTS.items():
        lines = []
        for number in range(count):
            name, part = f"{kind}{number}", {"type": "text", "text": f"say {number}"}
            if kind == "image":
                Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(tmp_path / f"{name}.png")
                part = {"type": "image", "path": f"{name}.png"}
            elif kind == "speech":
                soundfile.write(tmp_path / f"{name}.wav", sound, 16000)
                part = {"type": "speech", "path": f"{name}.wav"}
            turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": name}]
            lines.append(json.dumps({"id": name, "messages": turns}))
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    return [str(tmp_path / f"{kind}.jsonl") for kind in COUNTS]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_sample_once_and_no_rank_idle_on_a_modality(files, tmp_path):
    """Batches of 2 on each of two ranks: 2 steps of pictures (4 and 3), 1 of speech, 2 of text."""
    run = {
        "stage": "mixture",
        "output": str(tmp_path / "run"),
        "model": {
            "llm": str(save_tiny_llm(tmp_path / "llm")),
            "modalities": {"image": IMAGE, "speech": SPEECH},
            "trainable": [{"match": "model.connectors.*", "lr": 1e-3}],
        },
        "data": {"train": files, "steps": 5, "batch_size": 2},
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    said = run_together(2, COUNT, str(tmp_path / "run.yaml"))
    ranks = [json.loads(text.rsplit("counted ", 1)[1].splitlines()[0]) for text in said]
    seen = Counter(name for steps in ranks for step in steps for name in step["ids"])
    assert seen == Counter(f"{kind}{number}" for kind, count in COUNTS.items() for number in range(count))
    idle = [(one, other) for one, other in zip(*ranks, strict=True) if one["towers"] != other["towers"]]
    assert not idle, "a tower ran on one rank while the other had nothing for it"
    ran = Counter(tower for step in ranks[0] for tower in step["towers"])
    assert ran == {"image": 2, "speech": 1}
