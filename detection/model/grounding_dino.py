"""Converts Grounding DINO and MM-Grounding-DINO checkpoints of transformers.

Our model computes the same. It differs from that of transformers where that cannot be trained from scratch
(query selection gets no gradient) or has no place for experts (the FFN is not a module).
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from unimoe.errors import UserError, first_line

from .build import Built
from .configuration import DynamicDinoConfig
from .modeling import DynamicDinoForObjectDetection

MODEL_TYPES = ("grounding-dino", "mm-grounding-dino")

IMAGE_SIZE = [800, 1333]
"""Shorter side and limit of the longer one, if no image processor was published with the weights."""

RENAMED = {
    r"^model\.decoder\.(bbox|class)_embed\..*": None,  # the heads once more
    r"^model\.backbone\.conv_encoder\.model\.": "backbone.",
    r"^model\.input_proj_vision\.": "image_projections.",
    r"^model\.text_backbone\.": "text_encoder.",
    r"^model\.text_projection\.": "text_projection.",
    r"^model\.query_position_embeddings\.": "query_embedding.",
    r"^model\.encoder\.": "enhancer.",
    r"^model\.level_embed": "enhancer.level_embed",
    r"^model\.enc_output\.": "selection.output.",
    r"^model\.enc_output_norm\.": "selection.output_norm.",
    r"^model\.encoder_output_bbox_embed\.": "selection.box_head.",
    r"^model\.encoder_output_class_embed\.": "selection.class_head.",
    r"^bbox_embed\.": "decoder.box_heads.",
    r"^class_embed\.": "decoder.class_heads.",
    r"^model\.decoder\.layer_norm\.": "decoder.norm.",
    r"^model\.decoder\.reference_points_head\.": "decoder.position_head.",
    r"^model\.decoder\.layers\.": "decoder.layers.",
    r"^(decoder\.layers\.\d+)\.self_attn_layer_norm\.": r"\1.self_attn_norm.",
    r"^(decoder\.layers\.\d+)\.encoder_attn_text_layer_norm\.": r"\1.text_attn_norm.",
    r"^(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.": r"\1.image_attn_norm.",
    r"^(decoder\.layers\.\d+)\.final_layer_norm\.": r"\1.ffn_norm.",
    r"^(decoder\.layers\.\d+)\.encoder_attn_text\.": r"\1.text_attn.",
    r"^(decoder\.layers\.\d+)\.encoder_attn\.": r"\1.image_attn.",
    r"^(decoder\.layers\.\d+)\.fc1\.": r"\1.ffn.up_proj.",
    r"^(decoder\.layers\.\d+)\.fc2\.": r"\1.ffn.down_proj.",
}
"""Patterns of their names -> our names, applied in this order; None drops a weight."""

FIXED = {
    "two_stage": True,
    "embedding_init_target": True,
    "two_stage_bbox_embed_share": False,
    "position_embedding_type": "sine",
    "query_dim": 4,
}
"""Settings of every public checkpoint; our model supports no others."""


def load_grounding_dino(path: str | Path) -> Built:
    """Load a folder or hub id of either type as our detector, with its tokenizer.

    Raises:
        UserError: it cannot be loaded, lacks a weight, is of another type, or its image processor does
            something that is not supported.
    """
    try:
        theirs, info = AutoModelForZeroShotObjectDetection.from_pretrained(
            str(path), dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"Grounding DINO '{path}' cannot be loaded: {reason}") from error
    if missing := sorted(name for name in info["missing_keys"] if convert_name(name)):
        raise UserError(
            f"Grounding DINO '{path}': config.json and weights differ: {len(missing)} missing keys, such as "
            f"{missing[0]}"
        )
    return convert(theirs, image_settings(str(path))), tokenizer


def image_settings(path: str) -> dict[str, Any]:
    """``image_size``, ``image_mean`` and ``image_std`` of the image processor that was published with the
    weights; empty if there is none.

    Raises:
        UserError: it prepares images in a way that is not supported.
    """
    try:
        found, _ = BaseImageProcessor.get_image_processor_dict(path)
    except (OSError, ValueError):
        return {}
    size = found.get("size") or {"shortest_edge": IMAGE_SIZE[0], "longest_edge": IMAGE_SIZE[1]}
    edges = [size.get(key) for key in ("shortest_edge", "longest_edge")] if isinstance(size, dict) else []
    if found.get("do_resize") is False or found.get("do_rescale") is False or None in edges or not edges:
        raise UserError(
            f"{path}: its image processor has size {size}, do_resize {found.get('do_resize', True)} and "
            f"do_rescale {found.get('do_rescale', True)}; expected a shortest_edge and a longest_edge"
        )
    normalized = found.get("do_normalize", True)
    means = found.get("image_mean") if normalized else [0.0] * 3
    return {
        "image_size": edges,
        "image_mean": means,
        "image_std": found.get("image_std") if normalized else [1.0] * 3,
    }


def convert(theirs: PreTrainedModel, settings: dict[str, Any] | None = None) -> DynamicDinoForObjectDetection:
    """A detector of ours with the weights and outputs of transformers' ``theirs``; ``settings`` as
    :func:`image_settings` gives them."""
    ours = DynamicDinoForObjectDetection(convert_config(theirs.config, settings))
    expected = ours.state_dict()
    weights = {convert_name(name): weight for name, weight in theirs.state_dict().items()}
    # a shared head is listed once for each layer there, its later copies have no place here
    ours.load_state_dict({name: weight for name, weight in weights.items() if name in expected})
    return ours.eval()


def convert_config(config: Any, settings: dict[str, Any] | None = None) -> DynamicDinoConfig:
    """The configuration of ours for one of theirs.

    Raises:
        UserError: it is of another kind of model, or has settings that no public checkpoint has.
    """
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"a model of type {config.model_type!r}, expected one of {', '.join(MODEL_TYPES)}")
    for name, value in FIXED.items():
        if getattr(config, name, value) != value:
            raise UserError(f"{config.model_type}: {name} is {getattr(config, name)!r}, expected {value!r}")
    for ours in ("attention_heads", "ffn_dim", "n_points"):
        encoder, decoder = (getattr(config, f"{part}_{ours}") for part in ("encoder", "decoder"))
        if encoder != decoder:
            raise UserError(
                f"{config.model_type}: encoder_{ours} is {encoder}, expected decoder_{ours} {decoder}"
            )
    scaled = config.model_type == "mm-grounding-dino"
    same = (
        "backbone_config",
        "text_config",
        "num_feature_levels",
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "num_queries",
        "activation_function",
        "dropout",
        "fusion_droppath",
        "layer_norm_eps",
        "positional_embedding_temperature",
    )
    return DynamicDinoConfig(
        enhancer="full",
        num_heads=config.decoder_attention_heads,
        ffn_dim=config.decoder_ffn_dim,
        num_points=config.decoder_n_points,
        scaled_logits=scaled,
        share_box_head=config.decoder_bbox_embed_share,
        share_class_bias=not scaled or config.decoder_cls_embed_share,
        max_text_tokens=config.max_text_len,
        text_sees_start=False,
        **{"image_size": IMAGE_SIZE, **(settings or {})},
        **{name: getattr(config, name) for name in same},
    )


def convert_name(name: str) -> str | None:
    """Our name of one of their weights; None for a weight that we do not have."""
    for pattern, ours in RENAMED.items():
        if ours is None and re.match(pattern, name):
            return None
        name = re.sub(pattern, ours or "", name)
    return name
