"""The visual tower of any open_clip model as an image encoder.

Shapes: B images, S = grid positions, D = width.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.convert import convert_state_dict

# The builders of the visual half alone: create_model would also build the text half, for which some models
# need a tokenizer or a configuration from the network.
from open_clip.model import CLIPVisionCfg, _build_vision_tower, resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from unimoe.errors import UserError

from .encoder import ImageEncoder, add_missing, nearest
from .timm_image import cut, describe, take, translate
from .weights import fill, hub_file, read_tensors, select_prefix

_SCHEMAS = ("local-dir:", "hf-hub:")
_MODEL_KEYS = ("embed_dim", "vision_cfg", "quick_gelu")
_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass
class OpenClipConfig:
    name: str | None = None
    """An open_clip model name such as ``ViT-B-32``; not needed with ``model_cfg``."""
    model_cfg: dict[str, Any] | None = None
    """An open_clip ``model_cfg`` (embed_dim, vision_cfg, quick_gelu); read from the folder for ``local-dir:``
    and ``hf-hub:`` weights."""
    image_size: int | None = None
    """Height and width of the input in pixels; None takes the model's own."""
    features_layer: int | None = None
    """Index of the block whose output is taken, negative from the end, without the final norm; None takes the
    last one with the final norm."""
    mean: list[float] | None = None
    """Per-channel mean on a 0..1 scale; None takes that of the weights, or OpenAI's."""
    std: list[float] | None = None
    """Per-channel deviation on a 0..1 scale; None takes that of the weights, or OpenAI's."""
    interpolation: str | None = None
    """Resampling filter; None takes that of the weights, or bicubic."""


class OpenClipImageEncoder(ImageEncoder):
    """Patch tokens of an open_clip tower: ViT, ResNet or a timm trunk; text tower and projection are not
    kept.

    1. the tower's ``forward_intermediates`` up to the chosen block (a timm trunk's ``forward_features`` for
       the last);
    2. drop the class token, flatten to ``[B, S, D]`` row by row.
    """

    kind = "open_clip"
    Config = OpenClipConfig

    def __init__(self, config: OpenClipConfig):
        super().__init__(config)
        self.visual, self.level = create(config)
        size = image_size(config)
        with torch.device("meta"):
            twin, level = create(config)
            pixels = torch.empty(1, 3, size, size)
            name = config.name or "open_clip model"
            self.grid, self.hidden_size = describe(lambda: tokens(twin.eval(), pixels, level), name)
        self.preprocessing = {
            "image_size": size,
            "mean": list(config.mean or OPENAI_DATASET_MEAN),
            "std": list(config.std or OPENAI_DATASET_STD),
            "interpolation": config.interpolation or "bicubic",
        }

    @property
    def tower(self) -> nn.Module:
        return self.visual

    @classmethod
    def complete(cls, config: dict[str, Any], weights: str | None) -> dict[str, Any]:
        """Add the architecture and normalisation of a tag or of a ``local-dir:`` or ``hf-hub:`` place."""
        if weights is None:
            return config
        if weights.startswith(_SCHEMAS):
            file = _hosted(weights, "open_clip_config.json")
            found = json.loads(Path(file).read_text())
            if "model_cfg" not in found:
                raise UserError(f"{file}: has no model_cfg; expected an open_clip configuration")
            return add_missing(config, _describe(found["model_cfg"], found.get("preprocess_cfg", {})))
        name = config.get("name")
        tag = get_pretrained_cfg(name, weights) if name and not Path(weights).exists() else {}
        if tag:  # it knows better than the name which GELU its weights were trained with
            model_cfg = {**architecture(name), "quick_gelu": tag.get("quick_gelu", False)}
            return add_missing(config, _describe(model_cfg, tag))
        return config

    def load_weights(self, weights: str) -> None:
        """Fill from a file or folder, an open_clip tag, ``local-dir:folder`` or ``hf-hub:owner/name``."""
        path, name = weights, self.config["name"]
        if weights.startswith("local-dir:"):
            path = weights.removeprefix("local-dir:")
        elif weights.startswith("hf-hub:"):
            path = _hosted(weights, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        elif not Path(weights).exists():
            tag = get_pretrained_cfg(name, weights) if name else {}
            if not tag:
                known = ", ".join(list_pretrained_tags_by_model(name)) if name else "none without a name"
                raise UserError(
                    f"{weights}: neither a file nor an open_clip tag of {name}; tags: {known or 'none'}"
                )
            try:
                path = download_pretrained(tag)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"{name}: cannot download the weights of tag {weights!r} ({error})"
                ) from error
        tensors = read_tensors(path)
        whole: Any = SimpleNamespace(visual=self.visual)  # open_clip's helpers want a model with a tower
        tensors = convert_state_dict(whole, tensors)
        if not any(name.startswith("visual.") for name in tensors):  # a tower saved on its own
            tensors = {"visual." + name: tensor for name, tensor in tensors.items()}
        resize_pos_embed(tensors, whole)
        if isinstance(self.visual, TimmModel):
            trunk = select_prefix(tensors, self.visual.trunk, ("visual.trunk.",))
            fill(self.visual.trunk, translate(trunk, self.visual.trunk), weights)
        else:
            fill(self.visual, select_prefix(tensors, self.visual, ("visual.",)), weights)

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        return tokens(self.visual, pixels_B3HW, self.level)


def architecture(name: str | None) -> dict[str, Any]:
    """open_clip's ``model_cfg`` for a built-in name.

    Raises:
        UserError: the name is unknown; the message lists the closest ones.
    """
    if name and name.startswith(_SCHEMAS):
        raise UserError(
            f"open_clip: {name!r} is a place of weights; give it as weights, or the model_cfg itself"
        )
    found = open_clip.get_model_config(name) if name else None
    if found is None:
        raise UserError(
            f"open_clip has no model {name!r}; closest: {nearest(name or '', open_clip.list_models())}"
        )
    return found


def image_size(config: OpenClipConfig) -> int:
    """The configured input size, or the architecture's own.

    Raises:
        UserError: it is not square.
    """
    size = config.image_size or (config.model_cfg or architecture(config.name))["vision_cfg"].get(
        "image_size", 224
    )
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"open_clip: {config.name} takes images of {size}, expected a square; set image_size")
    return sides.pop()


def create(config: OpenClipConfig) -> tuple[Any, int | None]:
    """The bare tower, cut behind the chosen block and without projection and pooling, and the level to take.

    Raises:
        UserError: the name is unknown, the ``model_cfg`` is not understood, or the block does not exist.
    """
    model_cfg = deepcopy(config.model_cfg or architecture(config.name))
    missing = [key for key in ("embed_dim", "vision_cfg") if key not in model_cfg]
    if missing:
        raise UserError(f"open_clip: model_cfg lacks {', '.join(missing)}; found {', '.join(model_cfg)}")
    size, layer = image_size(config), config.features_layer
    own = {"timm_model_pretrained": False, "patch_dropout": 0.0, "image_size": size}
    try:
        visual: Any = _build_vision_tower(
            model_cfg["embed_dim"],
            CLIPVisionCfg(**{**model_cfg["vision_cfg"], **own}),
            model_cfg.get("quick_gelu", False),
        )
    except TypeError as error:
        raise UserError(f"open_clip: model_cfg is not understood ({error})") from error
    try:
        if isinstance(visual, TimmModel):
            visual.head = nn.Sequential()
            visual.set_input_size(size)
            return visual, cut(visual.trunk, layer)
        return visual, (_cut_resnet if isinstance(visual, ModifiedResNet) else _cut_vit)(visual, layer)
    except AssertionError as error:
        raise UserError(f"open_clip: features_layer {layer}: {error}") from error


def _cut_resnet(visual: Any, layer: int | None) -> int:
    """Levels are the stem and four stages; those behind the chosen one become the identity."""
    visual.attnpool = nn.Identity()
    level = 4 if layer is None else layer % 5 if -5 <= layer < 5 else -1
    assert level >= 0, "expected -5 to 4"
    for stage in _STAGES[level:]:
        setattr(visual, stage, nn.Identity())
    return level


def _cut_vit(visual: Any, layer: int | None) -> int:
    # CoCa's norm comes after its attention pooling and has that width, so its tokens stay as the blocks leave
    # them.
    unnormed = visual.attn_pool is not None or layer is not None
    visual.attn_pool = visual.attn_pool_contrastive = None
    return visual.prune_intermediate_layers([-1 if layer is None else layer], prune_norm=unnormed)[-1]


def tokens(visual: Any, pixels_B3HW: Tensor, level: int | None) -> Tensor:
    """The spatial tokens of a tower and level made by ``create``, ``[B, S, D]``."""
    if isinstance(visual, TimmModel):
        return take(visual.trunk, pixels_B3HW, level)
    # The norm is the identity where ``create`` took it off.
    found = visual.forward_intermediates(
        pixels_B3HW, indices=[level], intermediates_only=True, normalize_intermediates=True
    )
    return found["image_intermediates"][-1].flatten(2).transpose(1, 2)


def _describe(model_cfg: dict[str, Any], preprocess: dict[str, Any]) -> dict[str, Any]:
    """The keys of an OpenClipConfig that a model's own description answers."""
    found = {key: preprocess[key] for key in ("mean", "std", "interpolation") if preprocess.get(key)}
    return {**found, "model_cfg": {key: value for key, value in model_cfg.items() if key in _MODEL_KEYS}}


def _hosted(weights: str, *names: str) -> str:
    """The first of the named files in the place that ``weights`` names."""
    schema, _, place = weights.partition(":")
    if schema == "hf-hub":
        return hub_file(place, *names)
    for name in names:
        if (Path(place) / name).is_file():
            return str(Path(place) / name)
    raise UserError(f"{place}: expected {' or '.join(names)} there")
