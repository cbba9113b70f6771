"""The steps of a demo: each writes a result to the run folder and is skipped if that result exists."""

import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import yaml

from unimoe.artifacts import read_record
from unimoe.errors import UserError
from unimoe.files import atomic_write, lock_folder
from unimoe.prepare import prepare
from unimoe.prepare.cache import cache_folder, fault
from unimoe.prepare.parts import default_parts, find_part
from unimoe.training.progress import clock

from . import console


class Run(Protocol):
    """One run of a demo."""

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True)
class Step:
    """One step of the plan."""

    name: str
    """Also the key in ``seconds``."""
    about: str
    """Description for the user."""
    minutes: float
    """Duration on two idle cores."""
    act: Callable[[Any], object]
    done: Callable[[Any], bool]
    """Whether the result exists."""
    control: bool = False
    """Belongs to the dense control."""
    extended: bool = False
    """Belongs to the extended demo."""


def _prepare(run: Run):
    prepare()


def _prepared(run: Run) -> bool:
    return all(fault(find_part(name), cache_folder()) is None for name in default_parts())


PREPARE = Step("prepare", "download and convert the pretrained parts, once", 0.5, _prepare, _prepared)
"""The first step of every demo."""


def exists(name: str, run: Run) -> bool:
    """Whether a file or folder of the run exists."""
    return (run.folder / name).exists()


def never(run: Run) -> bool:
    """For a step that always runs."""
    return False


def shipped(name: str) -> Path:
    """Path of a file in configs/; ``name`` has no suffix."""
    return Path(str(files("unimoe.configs").joinpath(f"{name}.yaml")))


def configuration(path: Path, run: Run, default: str, **settings: Any) -> Path:
    """The YAML file ``path`` if the run uses the output folder ``default`` and no other ``settings``;
    otherwise a copy in the run folder with both replaced."""
    if run.folder == Path(default) and not settings:
        return path
    text = path.read_text(encoding="utf-8").replace(default, run.folder.as_posix())
    if settings:
        text = yaml.safe_dump({**yaml.safe_load(text), **settings}, sort_keys=False)
    copy = run.folder / "configs" / path.parent.name / path.name
    atomic_write(copy, text)
    return copy


def run_steps(run: Run, steps: Sequence[Step], purpose: str):
    """Print the plan, starting with ``purpose``, and run the steps whose results do not exist yet.

    Raises:
        UserError: another process works in the same folder.
    """
    with lock_folder(run.folder):
        _run_steps(run, steps, purpose)


def _run_steps(run: Run, steps: Sequence[Step], purpose: str):
    todo = [step for step in steps if not step.done(run)]
    console.announce(
        purpose, run.folder, [(step.name, step.about, step.minutes, step in todo) for step in steps]
    )
    for number, step in enumerate(steps, 1):
        label = f"[{number:>2}/{len(steps)}] {step.name}"
        if step not in todo:
            console.say(f"{label}: already done")
            continue
        console.say(f"{label}: {step.about} ({console.minutes(step.minutes)})")
        started = time.monotonic()
        step.act(run)
        gc.collect()
        seconds = _note_seconds(run, steps, step.name, time.monotonic() - started)
        console.say(f"{label}: done in {clock(seconds)}")


def _note_seconds(run: Run, steps: Sequence[Step], name: str, seconds: float) -> float:
    """Add the duration of a step to ``seconds.json``, including the training time of killed runs."""
    path = run.folder / "seconds.json"
    noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    record = read_record(run.folder / name)
    spent = max(seconds, record.seconds if record else 0.0)
    noted[name] = round(spent, 1)
    ordered = {step.name: noted.pop(step.name) for step in steps if step.name in noted} | noted
    atomic_write(path, json.dumps(ordered, indent=1) + "\n")
    return spent


def note_settings(folder: Path, settings: dict[str, Any]):
    """Write ``demo.json``.

    Raises:
        UserError: the folder belongs to a run with other settings.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; expected a folder")
    path = folder / "demo.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else settings
    for key, value in settings.items():
        if found.get(key, False) != value:  # a switch that is not noted was off
            there = f"{folder} was started with {key} {found.get(key, False)}, found {value}"
            raise UserError(f"{there}; choose another --output, or delete {folder}")
    atomic_write(path, json.dumps(settings, indent=1) + "\n")
