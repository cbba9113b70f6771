"""Public weights: transformers' Grounding DINO and MM-Grounding-DINO as models of ours.

Ours differs where transformers' cannot be trained from scratch (query selection gets no gradient there) or
leaves no room for mixtures (the FFN is not a module); what it computes is the same.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer, PreTrainedModel

from unimoe.errors import UserError, first_line

from .build import Built
from .configuration import DynamicDinoConfig
from .modeling import DynamicDinoForObjectDetection

MODEL_TYPES = ("grounding-dino", "mm-grounding-dino")

IMAGE_SIZE = [800, 1333]
"""What every public checkpoint is evaluated at: shorter side, limit of the longer one."""

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
"""Theirs to ours, in this order; None drops a weight."""

FIXED = {
    "two_stage": True,
    "embedding_init_target": True,
    "two_stage_bbox_embed_share": False,
    "position_embedding_type": "sine",
    "query_dim": 4,
}
"""What every public checkpoint has, and ours does not offer otherwise."""


def load_grounding_dino(path: str | Path) -> Built:
    """A folder or hub id of either kind as a detector of ours, and its tokenizer.

    Raises UserError when it cannot be loaded or is of another kind.
    """
    try:
        theirs = AutoModelForZeroShotObjectDetection.from_pretrained(str(path), dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"Grounding DINO '{path}' cannot be loaded: {reason}") from error
    return convert(theirs), tokenizer


def convert(theirs: PreTrainedModel) -> DynamicDinoForObjectDetection:
    """A detector of ours with the weights and outputs of transformers' ``theirs``."""
    ours = DynamicDinoForObjectDetection(convert_config(theirs.config))
    expected = ours.state_dict()
    weights = {convert_name(name): weight for name, weight in theirs.state_dict().items()}
    # a shared head is listed once for each layer there, its later copies have no place here
    ours.load_state_dict({name: weight for name, weight in weights.items() if name in expected})
    return ours.eval()


def convert_config(config: Any) -> DynamicDinoConfig:
    """Raises UserError for another kind of model and for settings that no public checkpoint has."""
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
        image_size=IMAGE_SIZE,
        **{name: getattr(config, name) for name in same},
    )


def convert_name(name: str) -> str | None:
    """Our name of a weight of theirs; None for one that we do not have."""
    for pattern, ours in RENAMED.items():
        if ours is None and re.match(pattern, name):
            return None
        name = re.sub(pattern, ours or "", name)
    return name
