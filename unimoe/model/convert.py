"""``unimoe convert``: models of other makers as ours, weight by weight."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from unimoe.artifacts import StageRecord, folder_hash, write_model
from unimoe.encoders import build_encoder
from unimoe.encoders.weights import fill, select_prefix
from unimoe.errors import UserError, first_line
from unimoe.files import new_folder

from .build import Built, assemble_model, build_model
from .llm import add_placeholders

log = logging.getLogger(__name__)

TOWERS = {"clip_vision_model": ("clip", "default"), "siglip_vision_model": ("siglip", "full")}
"""Type of a LLaVA vision tower: our encoder, and the selection of positions that it stands for (CLIP's class
token is dropped, SigLIP has none)."""

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the filters that our image preprocessing knows."""


def llava(source: str, output: str, chat_template: str = "vicuna") -> None:
    """Turn a LLaVA-1.5 checkpoint in transformers' format into a model of ours with the same logits.

    Args:
        source: folder or hub id, such as llava-hf/llava-1.5-7b-hf.
        output: folder of the result: start other stages from it, or chat with it.
        chat_template: vicuna, chatml, or a Jinja template.
    """
    folder = new_folder(output, "OUTPUT")
    model, processor = read_llava(source, chat_template)
    parents = [{"folder": source, "sha256": folder_hash(source)}] if Path(source).is_dir() else []
    total = sum(parameter.numel() for parameter in model.parameters())
    settings = {"source": source, "chat_template": chat_template}
    record = StageRecord("convert llava", settings, parents, parameters={"total": total})
    write_model(folder, model, processor, record)
    log.info("%s: %s parameters out of %s", folder, f"{total:,}", source)


def llm(source: str, output: str, chat_template: str | None = None) -> None:
    """Turn a causal LM of transformers, dense or a mixture of experts, into a model that chat, serve,
    evaluate, inspect and compress take. The model takes text alone, and its logits stay the same.

    Args:
        source: folder or hub id, such as allenai/OLMoE-1B-7B-0125-Instruct.
        output: folder of the result.
        chat_template: vicuna, chatml, or a Jinja template; without it the tokenizer's own.
    """
    folder = new_folder(output, "OUTPUT")
    model, processor = build_model(source, {}, None, chat_template)
    parents = [{"folder": source, "sha256": folder_hash(source)}] if Path(source).is_dir() else []
    total = sum(parameter.numel() for parameter in model.parameters())
    settings = {"source": source, "chat_template": chat_template}
    record = StageRecord("convert llm", settings, parents, parameters={"total": total})
    write_model(folder, model, processor, record)
    log.info("%s: %s parameters out of %s", folder, f"{total:,}", source)


def read_llava(source: str, chat_template: str = "vicuna") -> Built:
    """The model and processor that a LLaVA-1.5 checkpoint describes, in its dtype.

    Raises:
        UserError: it is no LLaVA checkpoint, or has parts that are not supported.
    """
    try:
        config: Any = AutoConfig.from_pretrained(source)
        if config.model_type != "llava":
            raise UserError(f"SOURCE {source} holds a model of type {config.model_type!r}, expected 'llava'")
        image = image_modality(config, source)
        images: Any = AutoImageProcessor.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = LlavaForConditionalGeneration.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        raise UserError(f"SOURCE {source} cannot be read: {first_line(error)}") from error
    settings = {
        **image["encoder"],
        "mean": list(images.image_mean),
        "std": list(images.image_std),
        "interpolation": RESAMPLING[int(images.resample)],
        "fit": "crop" if images.do_center_crop else "pad" if getattr(images, "do_pad", False) else "stretch",
    }
    encoder: Any = build_encoder(settings).to(model.dtype)
    tower = model.model.vision_tower.state_dict()
    fill(encoder.tower, select_prefix(tower, encoder.tower, encoder.prefixes), source)

    with torch.device("meta"):
        causal: Any = AutoModelForCausalLM.from_config(config.text_config)
    setattr(causal, causal.base_model_prefix, model.model.language_model)
    causal.set_output_embeddings(model.lm_head)
    causal.generation_config = model.generation_config
    add_placeholders(causal, tokenizer, chat_template)
    built, processor = assemble_model(causal, tokenizer, {"image": encoder}, {"image": image})
    connector: Any = built.model.connectors["image"]
    projector = model.model.multi_modal_projector
    connector.to(model.dtype)
    connector.layers[0].load_state_dict(projector.linear_1.state_dict())
    connector.layers[2].load_state_dict(projector.linear_2.state_dict())
    return built, processor


def image_modality(config: LlavaConfig, source: str = "llava") -> dict[str, dict[str, Any]]:
    """Our ``encoder`` and ``connector`` for the tower and the projector that a LLaVA configuration names.

    Raises:
        UserError: a part is not supported.
    """
    vision: Any = config.vision_config
    if vision.model_type not in TOWERS:
        raise UserError(f"{source}: vision tower {vision.model_type!r}, expected one of {', '.join(TOWERS)}")
    encoder, selection = TOWERS[vision.model_type]
    wanted = {
        "vision_feature_select_strategy": selection,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise UserError(f"{source}: {name} is {getattr(config, name)!r}, expected {value!r}")
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise UserError(f"{source}: vision_feature_layer is {layer!r}, expected one layer")
    return {
        "encoder": {"type": encoder, "config": vision.to_diff_dict(), "features_layer": layer},
        "connector": {"type": "mlp", "depth": 2},
    }
