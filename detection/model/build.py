"""Builds a new detector from a pretrained backbone and text encoder; everything else starts at random."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from unimoe.encoders.encoder import nearest
from unimoe.errors import UserError, first_line
from unimoe.prepare.cache import default_part, resolve_part

from .configuration import DynamicDinoConfig
from .modeling import DynamicDinoForObjectDetection

STRIDES = (8, 16, 32)

Built = tuple[DynamicDinoForObjectDetection, PreTrainedTokenizerBase]


def build_detector(
    backbone: str = "default", weights: str | None = None, text_encoder: str = "default", **settings: Any
) -> Built:
    """Build a detector and its tokenizer; everything except backbone and text encoder starts at random.

    Args:
        backbone: ``default`` (the prepared EfficientNet-Lite0) or any timm model with feature maps at strides
            8, 16 and 32.
        weights: weights of the backbone: a file, ``pretrained`` for those of timm, None for random ones.
        text_encoder: ``default`` (the prepared MiniLM), or the folder or hub id of a BERT-like encoder.
        settings: fields of :class:`~unimoe.detection.model.configuration.DynamicDinoConfig`.

    Raises:
        UserError: for an unknown setting, or a backbone or text encoder that cannot be used.
    """
    known = [field.name for field in fields(DynamicDinoConfig)]  # type: ignore[arg-type]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        closest = nearest(unknown[0], known)
        raise UserError(f"the detector has no setting {unknown[0]!r}; closest: {closest}")
    image, image_settings = load_backbone(backbone, weights)
    path = str(resolve_part(text_encoder, "text"))
    try:
        text = AutoModel.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"text encoder '{text_encoder}' cannot be loaded: {reason}") from error
    config = DynamicDinoConfig(text_config=text.config, **{**image_settings, **settings})
    model = DynamicDinoForObjectDetection(config)
    model.backbone._backbone.load_state_dict(image.state_dict())
    text.pooler = None
    model.text_encoder.load_state_dict(text.state_dict())
    _check_isolation(model.eval(), text_encoder)
    return model, tokenizer


def load_backbone(name: str, weights: str | None = None) -> tuple[Any, dict[str, Any]]:
    """A timm backbone, and the fields of the detector's configuration that depend on it.

    Raises:
        UserError: timm does not know the name, the model lacks a stride, or the weights cannot be loaded.
    """
    own = {}
    if name == "default":
        folder = default_part("image")
        own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name, weights = own["name"], str(folder / "model.safetensors")
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}; closest: {nearest(name, timm.list_models())}")
    keywords: dict[str, Any] = {"pretrained": weights is not None}
    if weights not in (None, "pretrained"):
        if not Path(str(weights)).is_file():
            raise UserError(f"backbone weights {weights}: no such file")
        keywords["pretrained_cfg_overlay"] = {"file": weights}
    try:
        with torch.device("meta"):
            frame: Any = timm.create_model(name, features_only=True)
        strides = frame.feature_info.reduction()
        levels = [strides.index(stride) for stride in STRIDES]
        model = timm.create_model(name, features_only=True, out_indices=levels, **keywords)
    except (RuntimeError, ValueError, AttributeError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"backbone {name} cannot be used: {reason}; it needs feature maps at strides 8, 16 and 32"
        ) from error
    data = own.get("pretrained_cfg") or resolve_model_data_config(model)
    return model, {
        "backbone_config": {"model_type": "timm_backbone", "backbone": name, "out_indices": levels},
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
    }


@torch.no_grad()
def _check_isolation(model: DynamicDinoForObjectDetection, name: str) -> None:
    """
    Raises:
        UserError: for a text encoder that ignores the attention mask between tokens.
    """
    ids = torch.tensor([[1, 2, 3], [1, 4, 3]])
    mask, positions = torch.eye(3, dtype=torch.bool).expand(2, -1, -1), torch.zeros_like(ids)
    try:
        first, second = model.encode_text(ids, mask, positions)
        isolated = torch.equal(first[2], second[2])
    except (RuntimeError, TypeError):
        isolated = False
    if not isolated:
        kind = model.text_encoder.config.model_type
        raise UserError(
            f"text encoder '{name}' ({kind}) lets phrases attend to one another; expected a BERT-like one"
        )
