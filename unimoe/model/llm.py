"""The dense LLM that a model starts from, and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from unimoe.errors import UserError, first_line
from unimoe.prepare.cache import resolve_part

from .chat_template import CHATML, CHATML_TOKENS, VICUNA
from .configuration import PLACEHOLDERS

TEMPLATES = {"chatml": CHATML, "vicuna": VICUNA}
"""Chat templates that have a name."""

_NEEDED = ("embed_tokens", "layers")
"""What a decoder must have under these names."""


def load_llm(llm: str, chat_template: str | None = None) -> tuple[Any, Any]:
    """A dense causal LM and its tokenizer, both with the media placeholders.

    The tokenizer gets the chat template, and ChatML's control tokens where that needs them.

    Raises:
        UserError: the LLM cannot be loaded, is an adapter, is quantized, or is of another build.
    """
    path = str(resolve_part(llm, "llm"))
    adapter = "is an adapter, not a model; merge it into its base (merge_and_unload) and save that"
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(f"llm '{llm}' {adapter}")
    causal: Any = None
    tokenizer: Any = None
    try:
        quantized = getattr(AutoConfig.from_pretrained(path), "quantization_config", None)
        if quantized is None:
            causal = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"llm '{llm}' cannot be loaded: {first_line(error)}") from error
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise UserError(f"llm '{llm}' is quantized ({method}) and cannot be trained; give the original")
    if getattr(causal, "_hf_peft_config_loaded", False):  # one from the hub
        raise UserError(f"llm '{llm}' {adapter}")
    decoder = getattr(causal, causal.base_model_prefix)
    if missing := [name for name in _NEEDED if not hasattr(decoder, name)]:
        raise UserError(
            f"llm '{llm}' is of type {causal.config.model_type!r}, whose decoder has no {missing[0]}; "
            "expected one that is built as those of LLaMA, Mistral, Qwen, Gemma, Phi and the like"
        )
    add_placeholders(causal, tokenizer, chat_template)
    return causal, tokenizer


def prepare_tokenizer(tokenizer: Any, chat_template: str | None = None) -> int:
    """Give a tokenizer the media placeholders and the chat template, in place; returns how many are new.

    Raises:
        UserError: the tokenizer has several templates and none is called default.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict) and not chat_template and "default" not in own:
        raise UserError(f"the tokenizer has the chat templates {', '.join(own)}; set chat_template to one")
    if isinstance(own, dict):
        name = chat_template or "default"
        chosen = own.get(name, name)
    else:
        chosen = chat_template or own
    chosen = chosen or "chatml"
    tokenizer.chat_template = TEMPLATES.get(chosen, chosen)
    needed = [*PLACEHOLDERS.values(), *(CHATML_TOKENS if tokenizer.chat_template == CHATML else ())]
    return tokenizer.add_special_tokens({"extra_special_tokens": needed}, replace_extra_special_tokens=False)


def add_placeholders(causal: Any, tokenizer: Any, chat_template: str | None = None) -> None:
    """Give a causal LM and its tokenizer the media placeholders and the chat template, in place."""
    new = prepare_tokenizer(tokenizer, chat_template)
    rows = causal.get_input_embeddings().weight.shape[0]
    if new and len(tokenizer) > rows:
        causal.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        head = causal.get_output_embeddings()
        with torch.no_grad():  # never read as inputs; as outputs they are suppressed
            for weight in {causal.get_input_embeddings().weight, head.weight}:
                weight[rows:] = weight[:rows].mean(0)
            if head.bias is not None:
                head.bias[rows:] = head.bias[:rows].mean()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte, with ChatML's control tokens; it needs no files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*control, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<|endoftext|>", "<|im_start|>"],
        chat_template=CHATML,
    )
