"""The converted image classifier, on the real weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unimoe.prepare import default_part

pytestmark = pytest.mark.weights


def test_efficientnet_names_photos(weights: Path):
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.imagenet_info import ImageNetInfo
    from timm.data.transforms_factory import transforms_imagenet_eval

    model = timm.create_model(f"local-dir:{default_part('image')}", pretrained=True).eval()
    settings, names = resolve_model_data_config(model), ImageNetInfo()
    keys = ("crop_pct", "interpolation", "mean", "std")
    transform: Any = transforms_imagenet_eval(
        settings["input_size"][1:], **{key: settings[key] for key in keys}
    )
    for photo, expected, least in (("chelsea.png", "cat", 0.8), ("coffee.png", "espresso", 0.8)):
        picture = Image.open(default_part("photos") / photo).convert("RGB")
        with torch.no_grad():
            p_3 = model(transform(picture)[None]).softmax(-1)[0].topk(3)
        found = {names.index_to_description(int(i)): float(p) for p, i in zip(*p_3, strict=True)}
        assert sum(p for name, p in found.items() if expected in name) > least, found


def test_efficientnet_keeps_batch_norm_statistics(weights: Path):
    state = load_file(default_part("image") / "model.safetensors")
    variances = [value for name, value in state.items() if name.endswith("running_var")]
    assert len(variances) == 49 and not any(torch.all(value == 1) for value in variances)
