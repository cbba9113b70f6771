"""A new model from parts: a dense LLM, encoders with their weights, fresh connectors."""

from typing import Any

import torch
from transformers import GenerationConfig

from unimoe.encoders import (
    Encoder,
    ImageEncoder,
    build_connector,
    copy_connector,
    fill_connector,
    load_encoder,
)
from unimoe.encoders.video import FramesEncoder
from unimoe.encoders.weights import own_weights
from unimoe.errors import UserError
from unimoe.moe import MoEConfig
from unimoe.moe.install import install_moe
from unimoe.moe.stock_records import leave_records
from unimoe.prepare.cache import resolve_part

from .configuration import MEDIA, PLACEHOLDERS, UniMoeConfig
from .generation import clean_generation_config
from .llm import load_llm
from .modeling import UniMoeForConditionalGeneration
from .processing import UniMoeProcessor
from .rope_3d import install_time_rotary

Built = tuple[UniMoeForConditionalGeneration, UniMoeProcessor]

_PART = {"video": "image", "audio": "speech"}
"""Modality whose prepared part is the default of one that has none of its own."""


def build_model(
    llm: str = "default",
    modalities: dict[str, dict[str, Any]] | None = None,
    moe: dict[str, Any] | None = None,
    chat_template: str | None = None,
    rope_sections: list[int] | None = None,
) -> Built:
    """Put a model and its processor together: connectors are random, everything else is pretrained.

    Args:
        llm: ``default``, a folder or a hub id of a causal LM.
        modalities: for each modality ``{"encoder": {"type", ..., "weights"}, "connector": {"type", ...}}``;
            ``weights`` is ``default``, a folder, a file, or what :func:`unimoe.encoders.load_encoder`
            understands (None: random). A connector's ``weights`` name a modality of the model, whose
            connector it is copied from, or a Whisper decoder, for a causal Q-Former.
        moe: fields of :class:`unimoe.moe.MoEConfig`, to copy the FFNs into experts at once; None keeps the
            LLM dense.
        chat_template: ``chatml``, ``vicuna``, a Jinja template, or None for the tokenizer's own.
        rope_sections: how many of a head's frequencies rotate with time, height and width
            (:mod:`unimoe.model.rope_3d`); None keeps positions a sequence.

    Raises:
        UserError: a part cannot be loaded, or parts do not fit together.
    """
    encoders = load_encoders(modalities or {})
    model, processor = assemble_model(*load_llm(llm, chat_template), encoders, modalities or {}, moe)
    if rope_sections:
        install_time_rotary(model.model.language_model, rope_sections)
        model.config.rope_sections, processor.rope_rate = rope_sections, model.config.rope_rate
    return model, processor


def load_encoders(modalities: dict[str, dict[str, Any]]) -> dict[str, Encoder]:
    """The encoder of each modality with its weights.

    Raises:
        UserError: an entry lacks a part, names an unknown modality, or an encoder of another one.
    """
    encoders = {}
    for modality, parts in modalities.items():
        if modality not in MEDIA:
            raise UserError(f"modalities: unknown modality '{modality}', expected one of {', '.join(MEDIA)}")
        if "encoder" not in parts or "connector" not in parts:
            raise UserError(
                f"modalities.{modality} needs the keys 'encoder' and 'connector', found {sorted(parts)}"
            )
        spec = dict(parts["encoder"])
        weights = spec.pop("weights", None)
        if weights:
            weights = resolve_part(weights, _PART.get(modality, modality))
        encoders[modality] = load_encoder(spec, weights)
        made_for = {encoders[modality].modality, modality}
        if len(made_for) > 1 and not made_for <= {"speech", "audio"}:
            raise UserError(
                f"modalities.{modality}: encoder type '{spec['type']}' is for {encoders[modality].modality}"
            )
    return encoders


def assemble_model(
    causal: Any,
    tokenizer: Any,
    encoders: dict[str, Encoder],
    modalities: dict[str, dict[str, Any]],
    moe: dict[str, Any] | None = None,
) -> Built:
    """A model from a causal LM that has the placeholders and from loaded encoders; see :func:`build_model`.

    Raises:
        UserError: the LLM in its new place gives other logits than alone.
    """
    config = UniMoeConfig(text_config=causal.config)
    with torch.device("meta"):  # only the frame: every part is put in below
        model = UniMoeForConditionalGeneration(config)
    decoder = getattr(causal, causal.base_model_prefix)
    leave_records(decoder)
    model.model.language_model = decoder
    model.lm_head = causal.get_output_embeddings()
    _check_logits(causal, model)
    _attach(model, tokenizer, encoders, modalities)
    if moe:
        settings = MoEConfig.for_upcycling(moe)
        install_moe(decoder, settings)
        config.moe = settings.to_dict()
    processor = UniMoeProcessor(tokenizer, processor_parts(model))
    model.generation_config = _generation_config(causal, processor)
    own_weights(model)  # as a saved model has them when it is loaded
    return model.eval(), processor


@torch.no_grad()
def _check_logits(causal: Any, model: UniMoeForConditionalGeneration) -> None:
    ids = torch.arange(8, device=causal.device)[None] % causal.config.vocab_size
    alone, found = (one.eval()(input_ids=ids).logits.float() for one in (causal, model))
    difference = float((found - alone).abs().max() / alone.abs().max().clamp(min=1e-9))
    if not difference <= 1e-3:
        raise UserError(
            f"{type(causal).__name__} gives other logits in its new place than alone (they differ by "
            f"{difference:.1g} of the largest): it computes them in a way that is not supported"
        )


def add_modalities(
    model: UniMoeForConditionalGeneration, processor: UniMoeProcessor, modalities: dict[str, dict[str, Any]]
) -> UniMoeProcessor:
    """Give a model modalities that it does not have yet, in place, as :func:`build_model` would.

    Returns:
        The processor of the extended model.

    Raises:
        UserError: the model has the modality already, or a part cannot be loaded.
    """
    for modality in modalities:
        if modality in model.model.encoders:
            raise UserError(
                f"modalities.{modality}: the model has {modality} already; name only modalities to add"
            )
    _attach(model, processor.tokenizer, load_encoders(modalities), modalities)
    template: Any = processor.chat_template  # one string; other processors may have several
    return UniMoeProcessor(processor.tokenizer, processor_parts(model), template, processor.rope_rate)


def _attach(
    model: UniMoeForConditionalGeneration,
    tokenizer: Any,
    encoders: dict[str, Encoder],
    modalities: dict[str, dict[str, Any]],
) -> None:
    config = model.config
    width = config.get_text_config().hidden_size
    for modality, encoder in encoders.items():
        settings = connector_settings(encoder, modalities[modality]["connector"])
        weights = modalities[modality]["connector"].get("weights")
        connector = build_connector(settings, encoder.hidden_size, width)
        if weights in model.model.connectors:
            source: Any = model.model.connectors[weights]
            copy_connector(connector, source)
        elif weights is not None:
            fill_connector(connector, weights)
        model.model.encoders[modality] = encoder
        model.model.connectors[modality] = connector
        config.modalities = {
            **(config.modalities or {}),
            modality: {"encoder": encoder.config, "connector": settings},
        }
        setattr(config, f"{modality}_token_id", tokenizer.convert_tokens_to_ids(PLACEHOLDERS[modality]))


def connector_settings(encoder: Encoder, given: dict[str, Any]) -> dict[str, Any]:
    """What a connector is built from: the settings that were given, and what it must know of its encoder."""
    settings = {name: value for name, value in given.items() if name != "weights"}
    if isinstance(encoder, FramesEncoder):
        frames = {"frames": encoder.preprocessing["frames"], "frame_positions": encoder.positions}
        settings = {"time": "keep", **settings, **frames}
    return settings


def processor_parts(model: UniMoeForConditionalGeneration) -> dict[str, Any]:
    """What the processor has to know about each modality of the model."""
    parts = {}
    modalities = model.config.modalities or {}
    for modality, encoder in model.model.encoders.items():
        if isinstance(encoder, ImageEncoder):
            preprocessing = {**encoder.preprocessing, "positions": encoder.num_tokens}
        else:
            preprocessing = encoder.preprocessing
        parts[modality] = {
            "preprocessing": preprocessing,
            "connector": modalities[modality]["connector"],
        }
    return parts


def _generation_config(causal: Any, processor: UniMoeProcessor) -> GenerationConfig:
    """The LLM's settings, which also end an answer at the control token that ends it in the template."""
    tokenizer: Any = processor.tokenizer
    given = causal.generation_config
    ends = given.eos_token_id if given is not None else None
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = [*ends] if isinstance(ends, (list, tuple)) else [ends]
    ends.append(processor.end_of_turn())
    pad = tokenizer.pad_token_id
    return clean_generation_config(
        given,
        eos_token_id=list(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        suppress_tokens=tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS.values())),
    )
