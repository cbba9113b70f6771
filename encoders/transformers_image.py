"""transformers' CLIP and SigLIP vision towers.

Shapes: B images, S = grid positions, D = width.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from unimoe.errors import UserError

from .encoder import ImageEncoder, add_missing
from .weights import find_weights, hub_file

_HUB_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
_RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # PIL's numbers


@dataclass
class VisionConfig:
    config: dict[str, Any] = field(default_factory=dict)
    """transformers' vision configuration as a dictionary. May be left out when loading weights that come with
    it."""
    features_layer: int | None = None
    """Index into ``hidden_states`` (0 is the embedding, negative from the end), without the final norm; None
    takes the last one with the final norm."""
    mean: list[float] | None = None
    """Per-channel mean on a 0..1 scale; None takes that of the weights, or the family's."""
    std: list[float] | None = None
    """Per-channel deviation on a 0..1 scale; None takes that of the weights, or the family's."""
    interpolation: str | None = None
    """Resampling filter; None takes that of the weights, or bicubic."""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """How an image becomes square: stretched; its longer sides cropped, as CLIP and LLaVA-1.5 in transformers
    do; or with bars of the mean colour, as LLaVA-1.5 was trained."""


@dataclass
class ClipConfig(VisionConfig):
    features_layer: int | None = -2
    """Index into ``hidden_states``, as above; LLaVA and Uni-MoE take -2."""


class TransformersImageEncoder(ImageEncoder):
    """``hidden_states[features_layer]`` of a transformers vision model, class token dropped.

    The model is built with only as many layers as are read; 336 pixels in patches of 14 give 576 tokens.
    """

    prefixes = ("", "vision_model.", "vision_tower.", "vision_tower.vision_model.", "model.vision_model.")
    model_class: ClassVar[Any]
    settings_class: ClassVar[Any]
    default_mean: ClassVar[tuple[float, ...]]
    default_std: ClassVar[tuple[float, ...]]

    def __init__(self, config: VisionConfig):
        super().__init__(config)
        if config.fit not in ("stretch", "crop", "pad"):
            raise UserError(f"{self.kind}: fit is {config.fit!r}, expected stretch, crop or pad")
        settings = self.settings_class(**config.config)
        layers, layer = settings.num_hidden_layers, config.features_layer
        if layer is not None and not -layers - 1 <= layer <= layers:
            raise UserError(f"{self.kind}: features_layer is {layer}, expected {-layers - 1} to {layers}")
        settings.num_hidden_layers = layers if layer is None else layer % (layers + 1)
        settings.vision_use_head = False  # SigLIP's pooling head; CLIP has none
        self.model = self.model_class(settings)
        if layer is not None:
            self.body.post_layernorm = nn.Identity()
        side = settings.image_size // settings.patch_size
        self.grid, self.hidden_size = (side, side), settings.hidden_size
        self.preprocessing = {
            "image_size": settings.image_size,
            "mean": list(config.mean or self.default_mean),
            "std": list(config.std or self.default_std),
            "interpolation": config.interpolation or "bicubic",
            "fit": config.fit,
        }

    @property
    def tower(self) -> nn.Module:
        return self.model

    @property
    def body(self) -> Any:
        """The module that holds the layers; older versions of transformers nest it one deeper."""
        return getattr(self.model, "vision_model", self.model)

    @classmethod
    def complete(cls, config: dict[str, Any], weights: str | None) -> dict[str, Any]:
        """Add the vision configuration and the normalisation that lie with the weights, here or on the
        hub."""
        if weights is None:
            return config
        found: dict[str, Any] = {}
        described = _beside(weights, "config.json")
        if not config.get("config") and described:
            whole = json.loads(Path(described).read_text())
            found["config"] = cls.settings_class.from_dict(whole.get("vision_config", whole)).to_diff_dict()
        prepared = _beside(weights, "preprocessor_config.json")
        if prepared:
            own = json.loads(Path(prepared).read_text())
            found |= {key: own[f"image_{key}"] for key in ("mean", "std") if own.get(f"image_{key}")}
            if own.get("resample") in range(len(_RESAMPLING)):
                found["interpolation"] = _RESAMPLING[own["resample"]]
        return add_missing(config, found)

    def load_weights(self, weights: str) -> None:
        """Fill from a file or folder, or from a hub id."""
        super().load_weights(
            weights if Path(weights).expanduser().exists() else hub_file(weights, *_HUB_WEIGHTS)
        )


class ClipImageEncoder(TransformersImageEncoder):
    """CLIP's ViT as LLaVA reads it (Liu et al., 2304.08485): last layer but one, without the class token."""

    kind = "clip"
    Config = ClipConfig
    model_class, settings_class = CLIPVisionModel, CLIPVisionConfig
    default_mean, default_std = tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        # CLIP applies its final norm to the class token only.
        return self.body.post_layernorm(self.model(pixels_B3HW).last_hidden_state[:, 1:])


class SiglipImageEncoder(TransformersImageEncoder):
    """SigLIP's ViT (Zhai et al., 2303.15343), which has no class token."""

    kind = "siglip"
    Config = VisionConfig
    model_class, settings_class = SiglipVisionModel, SiglipVisionConfig
    default_mean, default_std = tuple(IMAGENET_STANDARD_MEAN), tuple(IMAGENET_STANDARD_STD)

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        return self.model(pixels_B3HW).last_hidden_state


def _beside(weights: str, name: str) -> str | None:
    """A description that lies with the weights, or None. On the hub it must be there."""
    place = Path(weights).expanduser()
    if not place.exists():
        return hub_file(weights, name)
    file = find_weights(place).parent / name
    return str(file) if file.is_file() else None
