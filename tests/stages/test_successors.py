"""The stages of configs/uni_moe/published/audio_*.yaml in miniature, by their commands."""

from typing import Any

import torch
import yaml

from unimoe.model.loading import load_model
from unimoe.moe.install import moe_layers
from unimoe.stages.assemble import assemble


def test_warm_up_trains_what_is_new_and_the_balance_loss_fades(world, aligned, expert_folder, fit, tmp_path):
    manifest = {
        "base": str(aligned),
        "experts": [{"name": "own", "from": "base"}, {"name": "image", "from": str(expert_folder)}],
        "moe": {
            "slices": 2,
            "router": "top_p",
            "null_experts": 1,
            "shared_experts": 2,
            "shared_size": 8,
            "placement": "all",
            "gradient_estimator": "code",
        },
        "output": str(tmp_path / "start"),
    }
    (tmp_path / "assemble.yaml").write_text(yaml.safe_dump(manifest))
    assemble(str(tmp_path / "assemble.yaml"))
    fit(
        {
            "stage": "warmup",
            "output": str(tmp_path / "warmup"),
            "model": {
                "init_from": str(tmp_path / "start"),
                "trainable": [{"match": ["*.mlp.router.*", "*.mlp.shared.*"], "lr": 1e-2}],
                "anneal": {"balance": {"start": 0.025, "end": 0.001, "steps": 2}},
            },
            "data": {"train": str(world / "train.jsonl"), "steps": 3, "batch_size": 3},
        }
    )
    before, _ = load_model(tmp_path / "start", device="cpu")
    after, _ = load_model(tmp_path / "warmup", device="cpu")
    old, new = before.state_dict(), after.state_dict()
    changed = {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    assert changed == {name for name in old if ".mlp.router." in name or ".mlp.shared." in name}
    moe: Any = after.config.moe
    assert moe["losses"]["balance"] == 0.001
    layer: Any = moe_layers(after)[0]
    assert (
        layer.router.gradient_estimator == "code"
        and layer.router.num_experts == layer.experts.num_experts + 1 == 5
    )
