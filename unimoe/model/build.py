"""A new model from parts: a dense LLM, encoders with their weights, fresh connectors."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from unimoe.encoders import (
    Encoder,
    ImageEncoder,
    build_connector,
    copy_connector,
    fill_connector,
    load_encoder,
)
from unimoe.encoders.video import FramesEncoder
from unimoe.errors import UserError, first_line
from unimoe.moe import MoEConfig
from unimoe.moe.install import install_moe
from unimoe.prepare.cache import resolve_part

from .chat_template import CHATML, CHATML_TOKENS, VICUNA
from .configuration import MEDIA, PLACEHOLDERS, UniMoeConfig
from .modeling import UniMoeForConditionalGeneration
from .processing import UniMoeProcessor
from .rope_3d import install_time_rotary

Built = tuple[UniMoeForConditionalGeneration, UniMoeProcessor]

_PART = {"video": "image", "audio": "speech"}
"""Whose prepared part is the default of a medium that has none of its own."""

TEMPLATES = {"chatml": CHATML, "vicuna": VICUNA}
"""Chat templates that have a name."""


def build_model(
    llm: str = "default",
    modalities: dict[str, dict[str, Any]] | None = None,
    moe: dict[str, Any] | None = None,
    chat_template: str | None = None,
    rope_sections: list[int] | None = None,
) -> Built:
    """Put a model and its processor together; connectors start at random, all else as its maker left it.

    Args:
        llm: ``default``, a folder or a hub id of a causal LM.
        modalities: for each medium ``{"encoder": {"type", ..., "weights"}, "connector": {"type", ...}}``;
            ``weights`` is ``default``, a folder, a file, or what :func:`unimoe.encoders.load_encoder`
            understands (None: random). A connector's ``weights`` name a medium of the model, whose
            connector it starts as, or a Whisper decoder, for a causal Q-Former.
        moe: fields of :class:`unimoe.moe.MoEConfig`, to copy the FFNs into experts at once; None keeps the
            LLM dense.
        chat_template: ``chatml``, ``vicuna``, a Jinja template, or None for the tokenizer's own.
        rope_sections: how many of a head's frequencies turn with time, height and width of a medium
            (:mod:`unimoe.model.rope_3d`); None keeps positions a sequence.
    """
    encoders = load_encoders(modalities or {})
    model, processor = assemble_model(*load_llm(llm, chat_template), encoders, modalities or {}, moe)
    if rope_sections:
        install_time_rotary(model.model.language_model, rope_sections)
        model.config.rope_sections, processor.rope_rate = rope_sections, model.config.rope_rate
    return model, processor


def load_encoders(modalities: dict[str, dict[str, Any]]) -> dict[str, Encoder]:
    """The encoder of each medium with its weights. Raises UserError for an entry that is not whole."""
    encoders = {}
    for kind, parts in modalities.items():
        if kind not in MEDIA:
            raise UserError(f"modalities: unknown medium '{kind}', expected one of {', '.join(MEDIA)}")
        if "encoder" not in parts or "connector" not in parts:
            raise UserError(
                f"modalities.{kind} needs the keys 'encoder' and 'connector', found {sorted(parts)}"
            )
        spec = dict(parts["encoder"])
        weights = spec.pop("weights", None)
        encoders[kind] = load_encoder(spec, resolve_part(weights, _PART.get(kind, kind)) if weights else None)
        made_for = {encoders[kind].modality, kind}
        if len(made_for) > 1 and not made_for <= {"speech", "audio"}:
            raise UserError(
                f"modalities.{kind}: encoder type '{spec['type']}' is for {encoders[kind].modality}"
            )
    return encoders


def assemble_model(
    causal: Any,
    tokenizer: Any,
    encoders: dict[str, Encoder],
    modalities: dict[str, dict[str, Any]],
    moe: dict[str, Any] | None = None,
) -> Built:
    """A model of a causal LM that has the placeholders and of loaded encoders; see :func:`build_model`."""
    config = UniMoeConfig(text_config=causal.config)
    with torch.device("meta"):  # only the frame: every part is put in below
        model = UniMoeForConditionalGeneration(config)
    decoder = getattr(causal, causal.base_model_prefix)
    model.model.language_model = decoder
    model.lm_head = causal.get_output_embeddings()
    _attach(model, tokenizer, encoders, modalities)
    if moe:
        settings = MoEConfig.from_dict(moe)
        install_moe(decoder, settings)
        config.moe = settings.to_dict()
    model.generation_config = _generation_config(causal, tokenizer)
    return model.eval(), UniMoeProcessor(tokenizer, processor_parts(model))


def add_modalities(
    model: UniMoeForConditionalGeneration, processor: UniMoeProcessor, modalities: dict[str, dict[str, Any]]
) -> UniMoeProcessor:
    """Give a model media that it does not have yet, in place, as :func:`build_model` would.

    Returns the processor of the extended model.
    """
    for kind in modalities:
        if kind in model.model.encoders:
            raise UserError(f"modalities.{kind}: the model has {kind} already; name only media to add")
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
    for kind, encoder in encoders.items():
        settings = connector_settings(encoder, modalities[kind]["connector"])
        weights = modalities[kind]["connector"].get("weights")
        connector = build_connector(settings, encoder.hidden_size, width)
        if weights in model.model.connectors:
            source: Any = model.model.connectors[weights]
            copy_connector(connector, source)
        elif weights is not None:
            fill_connector(connector, weights)
        model.model.encoders[kind] = encoder
        model.model.connectors[kind] = connector
        config.modalities = {
            **(config.modalities or {}),
            kind: {"encoder": encoder.config, "connector": settings},
        }
        setattr(config, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(PLACEHOLDERS[kind]))


def connector_settings(encoder: Encoder, given: dict[str, Any]) -> dict[str, Any]:
    """What a connector is built from: the settings that were given, and what it must know of its encoder."""
    settings = {name: value for name, value in given.items() if name != "weights"}
    if isinstance(encoder, FramesEncoder):
        frames = {"frames": encoder.preprocessing["frames"], "frame_positions": encoder.positions}
        settings = {"time": "keep", **settings, **frames}
    return settings


def load_llm(llm: str, chat_template: str | None = None) -> tuple[Any, Any]:
    """A dense causal LM and its tokenizer, both with the media placeholders.

    The tokenizer gets the chat template, and ChatML's control tokens where that needs them. Raises UserError
    when the LLM cannot be had.
    """
    path = str(resolve_part(llm, "llm"))
    try:
        causal: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"llm '{llm}' cannot be loaded: {first_line(error)}") from error
    add_placeholders(causal, tokenizer, chat_template)
    return causal, tokenizer


def prepare_tokenizer(tokenizer: Any, chat_template: str | None = None) -> int:
    """Give a tokenizer the media placeholders and the chat template, in place; returns how many are new."""
    if chat_template is None and not tokenizer.chat_template:
        chat_template = "chatml"
    tokenizer.chat_template = TEMPLATES.get(chat_template or "", chat_template) or tokenizer.chat_template
    needed = [*PLACEHOLDERS.values(), *(CHATML_TOKENS if tokenizer.chat_template == CHATML else ())]
    return tokenizer.add_special_tokens({"extra_special_tokens": needed}, replace_extra_special_tokens=False)


def add_placeholders(causal: Any, tokenizer: Any, chat_template: str | None = None) -> None:
    """Give a causal LM and its tokenizer the media placeholders and the chat template, in place."""
    new = prepare_tokenizer(tokenizer, chat_template)
    rows = causal.get_input_embeddings().weight.shape[0]
    if new and len(tokenizer) > rows:
        causal.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():  # never read as inputs; as outputs they are suppressed
            for weight in {causal.get_input_embeddings().weight, causal.get_output_embeddings().weight}:
                weight[rows:] = weight[:rows].mean(0)


def processor_parts(model: UniMoeForConditionalGeneration) -> dict[str, Any]:
    """What the processor has to know about each medium of the model."""
    parts = {}
    modalities = model.config.modalities or {}
    for kind, encoder in model.model.encoders.items():
        if isinstance(encoder, ImageEncoder):
            preprocessing = {**encoder.preprocessing, "positions": encoder.num_tokens}
        else:
            preprocessing = encoder.preprocessing
        parts[kind] = {
            "preprocessing": preprocessing,
            "connector": modalities[kind]["connector"],
        }
    return parts


def _generation_config(causal, tokenizer) -> GenerationConfig:
    generation = causal.generation_config or GenerationConfig()
    ends = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if tokenizer.chat_template == CHATML:
        ends.append(tokenizer.convert_tokens_to_ids(CHATML_TOKENS[1]))
    generation.eos_token_id = list(dict.fromkeys(end for end in ends if end is not None))
    generation.pad_token_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    generation.suppress_tokens = tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS.values()))
    return generation
