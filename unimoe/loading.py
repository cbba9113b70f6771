"""Finding and loading a finished model: a folder from a stage or ``unimoe assemble``, or one on the hub."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoConfig

from unimoe.training.result import read_record

from .configuration import UniMoeConfig
from .errors import UserError
from .modeling import UniMoeForConditionalGeneration
from .processing import UniMoeProcessor

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FOLDER = "the folder of a finished stage (config.json and weights)"


def load_model(
    model: str | Path,
    setting: str = "MODEL",
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    hub: bool = True,
) -> tuple[UniMoeForConditionalGeneration, UniMoeProcessor]:
    """The model, in evaluation mode, and its processor.

    Args:
        model: a folder, or a hub id.
        setting: what errors call it: the flag or key that the user set.
        dtype: of the weights; ``auto`` takes that of the files.
        device: None takes the GPU if there is one.
        hub: whether a hub id will do.

    Raises UserError when there is no unimoe model, or its weights and its configuration do not have exactly
    the same names and shapes.
    """
    source = find_model(model, setting, hub)
    try:
        loaded: Any = UniMoeForConditionalGeneration.from_pretrained(
            source, dtype=dtype, output_loading_info=True, local_files_only=not hub
        )
        processor = UniMoeProcessor.from_pretrained(source, local_files_only=not hub)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{setting} {source} cannot be loaded: {_first_line(error)}") from error
    built, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[problem])):
            found = f"{len(names)} {problem.replace('_', ' ')}, such as {names[0]}"
            raise UserError(f"{setting} {source}: config.json and weights differ: {found}")
    return built.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor


def find_model(model: str | Path, setting: str = "MODEL", hub: bool = True) -> str:
    """``model`` as transformers wants it: a folder of ours, or a hub id. UserError if it is neither."""
    path = Path(model).expanduser()
    expected = f"{FOLDER}, or a hub id (owner/name)" if hub else FOLDER
    if path.is_dir():
        _check_folder(path, f"{setting} {path}", expected)
        return str(path)
    if path.exists():
        raise UserError(f"{setting} {path} is a file; expected {expected}")
    local = path.parent != Path(".") and path.parent.is_dir()  # runs/demo/mow, where runs/demo is there
    if not hub or local or not HUB_ID.fullmatch(str(model)):
        raise UserError(f"{setting} {model} does not exist; expected {expected}")
    try:
        config = AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        reason = _first_line(error)
        raise UserError(
            f"{setting} {model}: no such folder, and none of that name on the hub ({reason})"
        ) from error
    _check_type(config.model_type, f"{setting} {model}")
    return str(model)


def expert_names(model: str | Path, num_experts: int) -> list[str]:
    """How people call the experts: as the manifest of ``unimoe assemble`` does that the model in a stage's
    folder came from, else by their numbers."""
    folder, names = Path(model), []
    while not (manifest := folder / "manifest.yaml").is_file():
        done = read_record(folder)
        if done is None or not done.parents:
            break
        folder = Path(done.parents[0]["folder"])
    else:
        names = [str(slot["name"]) for slot in yaml.safe_load(manifest.read_text("utf-8"))["experts"]]
    return names if len(names) == num_experts else [str(number) for number in range(num_experts)]


def _check_folder(path: Path, found: str, expected: str):
    if (path / "expert.json").is_file():
        raise UserError(f"{found} holds one expert, not a model; put it into one with `unimoe assemble`")
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise UserError(f"{found} has no config.json; expected {expected}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{found}: config.json cannot be read: {_first_line(error)}") from error
    _check_type(kind, found)


def _check_type(kind: Any, found: str):
    if kind != UniMoeConfig.model_type:
        raise UserError(f"{found} holds a model of type {kind!r}, expected 'unimoe'")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
