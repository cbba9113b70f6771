"""The model card (README.md) of a multimodal model with MoE layers."""

import re
from pathlib import Path
from typing import Any

import yaml

from unimoe.moe import MoEConfig
from unimoe.moe.install import moe_layers

from .host import token_ids
from .utils import count_parameters

USE = """```python
import unimoe  # makes the MoE layers known to transformers
from transformers import AutoModelForMultimodalLM, AutoProcessor

model = AutoModelForMultimodalLM.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

`unimoe chat {name}` talks to it in the terminal."""


def model_card(model: Any, base: str, moe: MoEConfig, name: str = "PATH_OR_HUB_ID", trained: str = "") -> str:
    """A card with what can be told without a measurement.

    Args:
        model: with MoE layers.
        base: folder or hub id of the dense model.
        moe: its MoE layers.
        name: what the example loads.
        trained: stage and steps, if it was trained since.
    """
    total, active = count_parameters(model)
    layers = sorted(moe_layers(model))
    modalities = token_ids(model.config)
    facts = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if "image" in modalities else "any-to-any",
        "tags": ["unimoe", "mixture-of-experts", model.config.model_type],
    }
    on_hub = "/" in base and not Path(base).exists()
    if on_hub:
        facts["base_model"] = base
    of = model.config.get_text_config().num_hidden_layers
    router = ", ".join(f"{key} {value}" for key, value in moe.router.items() if value is not None)
    return (
        f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n\n"
        f"# {Path(base).name} with mixture-of-experts layers\n\n"
        f"Made by `unimoe upcycle` from {base if on_hub else Path(base).name}."
        f"{f' Trained by `unimoe fit`: {trained}.' if trained else ''}"
        f" It takes text{''.join(', ' + one for one in modalities)}.\n\n"
        f"| | |\n|---|---|\n| class | {type(model).__name__} |\n"
        f"| parameters | {total:,}, of them {active:,} active per token |\n"
        f"| MoE layers | {len(layers)} of {of}: {', '.join(map(str, layers))} |\n"
        f"| experts | {moe.num_experts} in each ({moe.experts['copies']} copies of the FFN, each in "
        f"{moe.experts['slices']} slices), {moe.shared['count']} shared |\n"
        f"| router | {router} |\n\n{USE.format(name=name)}\n"
    )


def upcycled_from(folder: str | Path) -> str:
    """The dense model that the card in a folder names; without a card, the folder itself."""
    path = Path(folder) / "README.md"
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"^Made by `unimoe upcycle` from (\S+)\. ", card, re.MULTILINE)
    return found.group(1) if found else str(folder)
