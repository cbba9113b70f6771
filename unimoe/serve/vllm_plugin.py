"""vLLM serves our models: after ``pip install unimoe`` next to vLLM, through its entry point
``vllm.general_plugins``.

vllm_plugin.py  what every vLLM process loads: names, and what a configuration tells vLLM. Imports no vLLM
vllm_model.py   the model on vLLM's Transformers backend: fused experts and attention, our encoders
vllm_inputs.py  from requests to token ids and encoder inputs, by our processor

Written for vLLM 0.32.
"""

# pyright: reportMissingImports=false

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

from unimoe.errors import UserError, first_line

log = logging.getLogger(__name__)

ARCHITECTURE = "UniMoeForConditionalGeneration"

AUDIO_PARTS = {"input_audio": ("speech", "audio"), "audio_url": ("audio", "speech")}
"""What an audio part of a request is: the first of these that the model takes, as on our server."""


def register() -> None:
    """Called by every vLLM process, whatever model it serves; so it logs what fails, and raises nothing."""
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.renderers.registry import RENDERER_REGISTRY
        from vllm.tokenizers.registry import TokenizerRegistry

        ModelRegistry.register_model(ARCHITECTURE, "unimoe.serve.vllm_model:UniMoeForVllm")
        MODELS_CONFIG_MAP[ARCHITECTURE] = ModelSettings
        TokenizerRegistry.register("unimoe", "vllm.tokenizers.hf", "CachedHfTokenizer")
        RENDERER_REGISTRY.register("unimoe", "unimoe.serve.vllm_inputs", "UniMoeRenderer")
    except Exception as error:  # noqa: BLE001  (another vLLM; its other models must start all the same)
        log.warning("this vLLM cannot serve unimoe models: %s", first_line(error))


class ModelSettings:
    """vLLM's hook for what follows from the configuration of one architecture."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Publish the experts, render prompts with our processor, and decode greedily unless the model's own
        settings sample, as our server does."""
        publish_experts(model_config.hf_config)
        model_config.model_arch_config = model_config.get_model_arch_config()
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = "unimoe"
        if not model_config.try_get_generation_config().get("do_sample"):
            model_config.override_generation_config.setdefault("temperature", 0.0)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Nothing."""


def publish_experts(config: Any) -> None:
    """Write the number of experts and of slots per token where vLLM looks for them: in ``text_config``.

    Args:
        config: a :class:`~unimoe.model.configuration.UniMoeConfig`.

    Raises:
        UserError: vLLM cannot express the model.
    """
    from unimoe.moe import MoEConfig
    from unimoe.moe.slot_layer import slots_per_token

    text = config.get_text_config()
    if config.rope_sections:
        raise UserError("vLLM cannot serve a model with rope_sections; use `unimoe serve`")
    if getattr(text, "logits_scaling", 1) != 1:
        raise UserError(f"vLLM cannot serve an LLM of type {text.model_type!r}, which scales its logits")
    if not config.moe:
        return
    act = getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UserError(f"vLLM cannot serve experts with the activation {act!r}; use `unimoe serve`")
    moe = MoEConfig.from_dict(config.moe)
    if moe.experts["kind"] != "swiglu":
        found = f"moe.experts of kind {moe.experts['kind']!r}"
        raise UserError(f"vLLM cannot serve {found}, expected swiglu; use `unimoe serve`")
    text.num_experts = moe.num_experts
    text.num_experts_per_tok = slots_per_token(moe, text.num_hidden_layers)


def refuse(settings: Mapping[str, Any], chat_template: Any) -> None:
    """Raises a UserError for settings of a request that would have no effect on its prompt."""
    if settings.get("chat_template") not in (None, chat_template):
        raise UserError("every request is rendered with the chat template of the model's folder")
    if settings.get("tools"):
        raise UserError("this model's prompts hold no tools; describe the answer in response_format")
    if settings.get("continue_final_message"):
        raise UserError("continue_final_message is not supported: an answer always begins a turn")


def with_list(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message of a request whose content can be read more than once."""
    content = message.get("content")
    return {**message, "content": content if content is None or isinstance(content, str) else [*content]}


def audio_modalities(messages: Sequence[Mapping[str, Any]], taken: Container[str]) -> list[str]:
    """``speech`` or ``audio`` for each audio part of a request, in order.

    Args:
        messages: of the request, as the client sent them.
        taken: modalities of the model.
    """
    found = []
    for message in messages:
        content = message.get("content") or ""
        for part in () if isinstance(content, str) else content:
            names = {part.get("type"), *part} if isinstance(part, dict) else ()  # the type may be left out
            for kind in AUDIO_PARTS.keys() & names:
                found.append(next((one for one in AUDIO_PARTS[kind] if one in taken), "audio"))
    return found


def plain_messages(conversation: Sequence[Mapping[str, Any]], audio: Sequence[str]) -> list[dict[str, Any]]:
    """The messages of our processor from those of vLLM, which calls all audio ``audio``.

    Args:
        conversation: messages whose parts are ``{"type": "text", "text": ...}`` or ``{"type": modality}``.
        audio: the modality of each audio part.
    """
    left = iter(audio)
    messages = []
    for message in conversation:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = [{**part, "type": next(left)} if part["type"] == "audio" else part for part in content]
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({"role": role, "content": content})
    return messages


def divide_audio(media: Mapping[str, Any], audio: Sequence[str]) -> dict[str, Any]:
    """Media by vLLM's modality, with what is speech under ``speech``."""
    divided = {modality: items for modality, items in media.items() if modality != "audio"}
    for modality, item in zip(audio, media.get("audio", ()), strict=False):
        divided.setdefault(modality, []).append(item)
    return divided
