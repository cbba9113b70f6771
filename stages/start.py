"""What a stage starts from: the folder of an earlier stage or of ``unimoe assemble``."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from unimoe.errors import UserError
from unimoe.modeling import UniMoeForConditionalGeneration
from unimoe.processing import UniMoeProcessor


def load_model(folder: str | Path) -> tuple[UniMoeForConditionalGeneration, UniMoeProcessor]:
    """The model and processor that a stage (or ``unimoe assemble``) left in ``folder``.

    Raises UserError when that is not the folder of a unimoe model, or when its weights and its configuration
    do not have exactly the same names and shapes.
    """
    check_model_folder(folder)
    try:
        loaded: Any = UniMoeForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        model, info = loaded
        processor = UniMoeProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[problem])):
            raise UserError(
                f"{folder}: its weights do not fit its config.json: "
                f"{len(names)} {problem.replace('_', ' ')}, first {names[0]}"
            )
    return model, processor


def check_model_folder(folder: str | Path):
    """Raises UserError unless ``folder`` looks like a saved unimoe model."""
    path = Path(folder)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"init_from: {path} {what}; expected the folder of a finished stage (config.json and weights)"
        )
    if (path / "expert.json").is_file():
        raise UserError(
            f"init_from: {path} holds an expert, not a model; put it in a slot with `unimoe assemble`"
        )
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise UserError(
            f"init_from: {path} has no config.json; expected the folder of a finished stage"
        ) from None
    except ValueError as error:
        raise UserError(f"init_from: {path / 'config.json'} is not JSON ({error})") from error
    if kind != "unimoe":
        raise UserError(
            f"init_from: {path} holds a model of type {kind!r}, expected 'unimoe'; "
            "to start from an LLM set model.llm"
        )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
