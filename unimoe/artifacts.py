"""Result folders of finished runs: a model or an expert, and ``stage.json``, which is written last."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from . import __version__
from .errors import UserError
from .files import atomic_folder, atomic_write, file_hash, fingerprint

STAGE_FILE = "stage.json"
SETTINGS_FILE = "settings.json"


@dataclass
class StageRecord:
    """The content of ``stage.json``."""

    stage: str
    """Name of the stage."""

    settings: dict[str, Any]
    """Everything that determined the result, by dotted key."""

    parents: list[dict[str, str]] = field(default_factory=list)
    """The folders it started from, with the hash of their weights."""

    data: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of samples."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of each logged metric."""

    parameters: dict[str, int] = field(default_factory=dict)
    """Numbers of parameters: total, trained, and trained by group."""

    steps: int = 0
    """Optimizer steps."""

    seconds: float = 0.0
    """Training time, including interrupted runs."""

    weights: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each weights file in the folder."""

    files: list[str] = field(default_factory=list)
    """All other files of the result."""

    versions: dict[str, str] = field(default_factory=dict)
    """Versions of Python and the packages that affect the numbers."""


def versions() -> dict[str, str]:
    """Versions of unimoe, Python and the packages that affect a result."""
    packages = ("torch", "transformers", "peft", "lightning", "timm", "safetensors")
    found = {name: version(name) for name in packages}
    return {"unimoe": __version__, "python": platform.python_version(), **found}


def write_model(
    output: Path, model: PreTrainedModel, processor: Any, record: StageRecord, card: str | None = None
):
    """Save a model and ``stage.json`` into ``output``, beside what is there.

    Args:
        output: folder.
        model: to save.
        processor: the model's processor or tokenizer.
        record: the content of ``stage.json``.
        card: the content of ``README.md``, if it gets one.
    """

    def save(folder: Path):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")

    write_result(output, save, record)


def check_savable(model: PreTrainedModel, processor: Any) -> None:
    """Save everything but the weights into a temporary folder, as :func:`write_model` would.

    Raises:
        UserError: something refuses to be saved, such as generation settings that contradict one another.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.config.save_pretrained(folder)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
            processor.save_pretrained(folder)
        except (ValueError, TypeError, OSError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the finished model could not be saved: {reason}") from error


def write_result(output: Path, save: Callable[[Path], object], record: StageRecord):
    """Let ``save(folder)`` fill a temporary folder, move that to ``output``, and write ``stage.json``."""
    fresh = output / ".result"
    with atomic_folder(fresh) as temporary:
        save(temporary)
        record.weights = {path.name: file_hash(path) for path in sorted(temporary.glob("*.safetensors"))}
    record.files = sorted(path.name for path in fresh.iterdir() if path.name not in record.weights)
    record.versions = versions()
    for path in sorted(fresh.iterdir()):
        path.chmod(0o644)  # safetensors makes its files private
        os.replace(path, output / path.name)
    fresh.rmdir()
    atomic_write(output / STAGE_FILE, json.dumps(asdict(record), indent=2) + "\n")


def read_record(folder: str | Path) -> StageRecord | None:
    """The record of a finished stage, None where there is none. Raises UserError if it is unreadable."""
    path = Path(folder) / STAGE_FILE
    if not path.is_file():
        return None
    try:
        return StageRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to run the stage again") from error


def folder_hash(folder: str | Path) -> str:
    """One hash over the weight files and the configuration of a result.

    Raises:
        UserError: there is no such folder.
    """
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"{folder} is no folder, expected that of a model (config.json and weights)")
    hashed = [
        f"{path.name} {file_hash(path)}\n"
        for path in sorted(place.iterdir())
        if path.suffix == ".safetensors" or path.name in ("config.json", "expert.json")
    ]
    return fingerprint(*hashed)


def start_hash(start: str | None) -> str | None:
    """Hash of the folder that a run starts from; ``None`` and an id on the hub as they are."""
    return folder_hash(start) if start is not None and Path(start).is_dir() else start


def describe_parent(folder: str | Path, sha256: str) -> dict[str, str]:
    """An entry of ``StageRecord.parents`` for a folder of this hash."""
    record = read_record(folder)
    return {"folder": str(folder), "stage": record.stage if record else "", "sha256": sha256}


def flatten(settings: Any, prefix: str = "", lists: bool = False) -> dict[str, Any]:
    """Nested settings as one level of dotted keys; lists stay whole, but with ``lists`` those of dicts."""
    if lists and isinstance(settings, list) and any(isinstance(item, dict) for item in settings):
        settings = dict(enumerate(settings))
    if not isinstance(settings, dict) or (not settings and prefix):
        return {prefix: settings}
    flat = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key), lists)
    return flat


_RENAMED = {"data.too_long": "data.overflow"}
_RENAMED_VALUES = {"data.overflow": {"cut": "truncate"}}


def current_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, as version 0.1 named them or as they are named now, under the current names."""
    renamed = {_RENAMED.get(key, key): value for key, value in settings.items()}
    for key, values in _RENAMED_VALUES.items():
        if key in renamed:
            renamed[key] = values.get(renamed[key], renamed[key])
    return renamed


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, str]:
    """The settings in which the two differ, with both values in words."""
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return {key: f"there {found.get(key)!r}, now {wanted.get(key)!r}" for key in keys}


def check_same(output: Path, found: dict[str, Any], wanted: dict[str, Any]):
    """Raises UserError naming the settings in which the content of ``output`` differs from ``wanted``."""
    different = [f"{key}: {values}" for key, values in differences(current_names(found), wanted).items()]
    if not different:
        return
    shown = "; ".join(different[:4])
    more = f" and {len(different) - 4} more" if len(different) > 4 else ""
    raise UserError(
        f"{output} was made with other settings ({shown}{more}); "
        "pass --overwrite true or choose another --output"
    )


def clear(output: Path):
    """Remove what a stage wrote into ``output``, and ``output`` itself if it is empty afterwards."""
    record = read_record(output)
    written = [*record.weights, *record.files] if record else []
    for name in [STAGE_FILE, SETTINGS_FILE, *written]:
        (output / name).unlink(missing_ok=True)
    for name in ("checkpoints", "logs"):
        shutil.rmtree(output / name, ignore_errors=True)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
