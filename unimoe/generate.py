"""Loading a finished model and asking it: one conversation as a stream, or many as batches."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig
from transformers.generation.streamers import TextStreamer

from unimoe.moe.install import moe_layers

from .configuration import UniMoeConfig
from .errors import UserError
from .modeling import UniMoeForConditionalGeneration
from .processing import UniMoeProcessor

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
EXPECTED = "the folder of a finished stage, or a hub id (owner/name)"
NO_SAMPLING = {"temperature": None, "top_p": None, "top_k": None, "min_p": None, "typical_p": None}
"""Settings that some LLMs bring along and that mean nothing to greedy decoding."""


def load_model(model: str | Path) -> tuple[UniMoeForConditionalGeneration, UniMoeProcessor]:
    """The model and the processor of a folder (or a hub id), ready to answer; on the GPU if there is one.

    Raises UserError when ``model`` is not a folder, holds no unimoe model, or its weights do not fit its
    configuration.
    """
    source = find_model(model)
    try:
        loaded: Any = UniMoeForConditionalGeneration.from_pretrained(
            source, dtype="auto", output_loading_info=True
        )
        processor = UniMoeProcessor.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"MODEL {source} cannot be loaded: {_first_line(error)}") from error
    built, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[problem])):
            what = problem.replace("_", " ")
            found = f"{len(names)} {what}, such as {names[0]}"
            raise UserError(f"MODEL {source}: config.json and weights differ: {found}")
    return built.to("cuda" if torch.cuda.is_available() else "cpu").eval(), processor


def find_model(model: str | Path) -> str:
    """``model`` as transformers wants it: a folder of ours, or a hub id. UserError if it is neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "expert.json").is_file():
            raise UserError(
                f"MODEL {path} holds one expert, not a model; put it into one with `unimoe assemble`"
            )
        try:
            kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        except FileNotFoundError:
            raise UserError(f"MODEL {path} has no config.json; expected {EXPECTED}") from None
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"MODEL {path / 'config.json'} cannot be read: {_first_line(error)}") from error
        _check_type(str(path), kind)
        return str(path)
    if path.exists():
        raise UserError(f"MODEL {path} is a file; expected {EXPECTED}")
    local = path.parent != Path(".") and path.parent.is_dir()  # runs/demo/mow, where runs/demo is there
    if local or not HUB_ID.fullmatch(str(model)):
        raise UserError(f"MODEL {model} does not exist; expected {EXPECTED}")
    try:
        config = AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        raise UserError(f"MODEL {model}: no such folder, and no such model on the hub ({reason})") from error
    _check_type(str(model), config.model_type)
    return str(model)


def _check_type(source: str, kind: Any):
    if kind != UniMoeConfig.model_type:
        raise UserError(f"MODEL {source} holds a model of type {kind!r}, expected 'unimoe'")


def generate(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    batch: Mapping[str, Any],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Answers to a batch of prompts that was padded on the left.

    Args:
        batch: from ``processor.pad(..., side="left")`` or ``apply_chat_template(..., tokenize=True)``.
        max_new_tokens: longest answer.
        temperature: 0 takes the most probable token each time.
        streamer: is told each token as it comes (one conversation only).
    """
    sampling: dict[str, Any] = {"do_sample": False, **NO_SAMPLING}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    inputs = {name: to_device(value, model.device) for name, value in batch.items()}
    settings = {"max_new_tokens": max_new_tokens, "streamer": streamer, **sampling}
    with torch.inference_mode():
        ids: Any = model.generate(**inputs, **settings)  # type: ignore[operator]
    answers = processor.tokenizer.batch_decode(
        ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [answer.strip() for answer in answers]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters of a model, and the active ones: without the experts that are not chosen for a token."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in moe_layers(model).values():
        experts = sum(parameter.numel() for parameter in layer.experts.parameters())
        chosen = getattr(layer.router, "k", layer.experts.num_experts)
        idle += experts - experts * chosen // layer.experts.num_experts
    return total, total - idle


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it, also inside dicts and tuples, on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return tuple(to_device(item, device) for item in value) if isinstance(value, tuple) else value


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
