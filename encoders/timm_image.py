"""Any timm backbone as an image encoder.

Shapes: B images, S = grid positions, D = width, C = channels of a feature map.
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from unimoe.errors import UserError, first_line

from .encoder import ImageEncoder, nearest
from .weights import fill, read_tensors, select_prefix


@dataclass
class TimmConfig:
    name: str
    """A timm model name, with or without a weights tag, such as ``tf_efficientnet_lite0``."""
    image_size: int = 224
    """Height and width of the input in pixels."""
    features_layer: int | None = None
    """Index among the model's feature levels (timm's ``forward_intermediates``), negative from the end,
    without the final norm; None takes ``forward_features``."""
    mean: list[float] | None = None
    """Per-channel mean on a 0..1 scale; None takes timm's own."""
    std: list[float] | None = None
    """Per-channel deviation on a 0..1 scale; None takes timm's own."""
    interpolation: str | None = None
    """Resampling filter; None takes timm's own."""


class TimmImageEncoder(ImageEncoder):
    """The unpooled features of a timm model, without its classifier.

    1. ``forward_features``, or one level of ``forward_intermediates``;
    2. drop prefix tokens, or flatten a feature map, to ``[B, S, D]`` row by row.
    """

    kind = "timm"
    Config = TimmConfig

    def __init__(self, config: TimmConfig):
        super().__init__(config)
        self.model, self.level = create(config)
        self.grid, self.hidden_size = feature_shape(config.name, config.image_size, config.features_layer)
        own = resolve_model_data_config(self.model)
        self.preprocessing = {
            "image_size": config.image_size,
            "mean": list(config.mean or own["mean"]),
            "std": list(config.std or own["std"]),
            "interpolation": config.interpolation or own["interpolation"],
        }

    @property
    def tower(self) -> nn.Module:
        return self.model

    def load_weights(self, weights: str) -> None:
        """Fill from a file or folder, or from timm's own weights when ``weights`` is ``pretrained``."""
        if weights == "pretrained":
            config = TimmConfig(**{key: value for key, value in self.config.items() if key != "type"})
            try:
                filled = create(config, pretrained=True)[0]
            except (OSError, RuntimeError) as error:
                reason = first_line(error)
                raise UserError(f"timm: cannot have the weights of {config.name} ({reason})") from error
            self.model.load_state_dict(filled.state_dict())
        else:
            tensors = select_prefix(read_tensors(weights), self.model, ("", "model.", "visual.trunk."))
            fill(self.model, translate(tensors, self.model), weights)

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        return take(self.model, pixels_B3HW, self.level)


@cache
def feature_shape(name: str, image_size: int, features_layer: int | None) -> tuple[tuple[int, int], int]:
    """Grid and width of a model's features, from a twin on the meta device, which needs no arithmetic and no
    memory, but as much time as the model itself to be built.

    Raises:
        UserError: timm does not know the name, or the model has no such level or takes no such image.
    """
    with torch.device("meta"):
        twin, level = create(TimmConfig(name, image_size, features_layer))
        pixels = torch.empty(1, 3, image_size, image_size)
        return describe(lambda: take(twin.eval(), pixels, level), name)


def create(config: TimmConfig, pretrained: bool = False) -> tuple[Any, int | None]:
    """The bare timm model, cut behind the chosen level, and that level's index (see ``cut``).

    Raises:
        UserError: timm does not know the name, or the model does not have the level.
    """
    if not timm.is_model(config.name):
        raise UserError(
            f"timm has no model {config.name!r}; closest: {nearest(config.name, timm.list_models())}"
        )
    keywords = {"pretrained": pretrained, "num_classes": 0}
    try:  # only models with positions take the size
        model = timm.create_model(config.name, img_size=config.image_size, **keywords)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(config.name, **keywords)
    try:
        return model, cut(model, config.features_layer)
    except AssertionError as error:
        raise UserError(f"timm: {config.name}: features_layer {config.features_layer}: {error}") from error


def cut(model: Any, features_layer: int | None) -> int | None:
    """Take off what the features do not pass through; returns the level as an index from the start.

    Raises:
        AssertionError: the index is out of range (as timm raises it).
    """
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool = None
    if isinstance(getattr(model, "fc_norm", None), nn.Module):
        model.fc_norm = nn.Identity()
    if features_layer is None:
        return None
    assert hasattr(model, "prune_intermediate_layers"), "the model has no intermediate features"
    return model.prune_intermediate_layers([features_layer], prune_norm=True, prune_head=True)[-1]


def take(model: Any, pixels_B3HW: Tensor, level: int | None) -> Tensor:
    """The unpooled features of a timm model as ``[B, S, D]``: the given level's, or all the way (None)."""
    if level is not None:
        found = model.forward_intermediates(pixels_B3HW, indices=[level], intermediates_only=True)[-1]
        return found.flatten(2).transpose(1, 2)
    found = model.forward_features(pixels_B3HW)
    if not isinstance(found, Tensor):
        raise UserError(f"{type(model).__name__}: features are {type(found).__name__}, expected one tensor")
    if found.ndim == 3:
        return found[:, prefix_tokens(model, found.shape[1]) :]
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return found.flatten(1, 2)
    return found.flatten(2).transpose(1, 2)


def prefix_tokens(model: Any, length: int) -> int:
    """How many class and register tokens stand before the grid; families that do not say have one or none."""
    said = getattr(model, "num_prefix_tokens", None)
    if said is None:
        said = int(math.isqrt(length) ** 2 != length)
    return said


def describe(run: Any, name: str) -> tuple[tuple[int, int], int]:
    """Grid and width of the features that ``run()`` returns for one square image."""
    try:
        features_1SD = run()
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"{name} does not take this image size: {first_line(error)}") from error
    side = math.isqrt(features_1SD.shape[1])
    if side * side != features_1SD.shape[1]:
        raise UserError(
            f"{name}: {features_1SD.shape[1]} feature positions are no square grid; choose another layer"
        )
    return (side, side), features_1SD.shape[2]


def translate(tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """``tensors`` through the family's own filter (other makers' names, resized position tables) if
    needed."""
    own = model.state_dict()
    if all(name in tensors and tensors[name].shape == own[name].shape for name in own):
        return tensors
    translator = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if translator is None:
        return tensors
    try:
        return translator(tensors, model)
    except (KeyError, RuntimeError, ValueError, AttributeError, TypeError):
        return tensors  # fill() then says which tensor does not fit
