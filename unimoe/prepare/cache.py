"""The cache of prepared parts, and how to look them up. Imports nothing heavy."""

import json
import os
from pathlib import Path

from unimoe.errors import UserError

from .parts import Part, find_part

MANIFEST = "part.json"


def cache_folder() -> Path:
    """The folder of prepared parts: the environment variable UNIMOE_CACHE, or ``~/.cache/unimoe``."""
    return Path(os.environ.get("UNIMOE_CACHE") or "~/.cache/unimoe").expanduser().absolute()


def default_part(name: str) -> Path:
    """The folder of a prepared part: llm, image, speech, text, sprites, photos, artist, noto, fluent or
    movielens.

    Raises:
        UserError: it is not in the cache, is incomplete, or was made by another version of its converter.
    """
    part = find_part(name)
    reason = fault(part, cache_folder())
    if reason:
        named = f" --parts {name}" if part.optional else ""
        raise UserError(f"{part.title}: {reason}; run `unimoe prepare{named}`")
    return cache_folder() / part.folder


def resolve_part(spec: str, part: str) -> str | Path:
    """Resolve a user's setting for ``part``: "default", a local folder or file, or a hub id.

    Returns:
        The prepared part's folder, the local path, or the hub id itself.

    Raises:
        UserError: ``spec`` looks like a path (starts with ``.``, ``/`` or ``~``, or has more than one slash)
            that does not exist.
    """
    if spec == "default":
        return default_part(part)
    path = Path(spec).expanduser()
    if spec and path.exists():
        return path
    looks_like_path = spec.startswith((".", "/", "~")) or spec.count("/") > 1 or "\\" in spec
    if looks_like_path or not spec:
        raise UserError(f"{part}: {spec!r} does not exist; expected default, a local folder or a hub id")
    return spec


def fault(part: Part, cache: Path) -> str | None:
    """Why the part in ``cache`` cannot be used, or None. Checks names and sizes only."""
    folder = cache / part.folder
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_of = (manifest["sha256"], manifest["converter_version"])
        sizes = dict(manifest["files"])
    except FileNotFoundError:
        return f"not in the cache {cache}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST} cannot be read"
    if made_of != (part.sha256, part.converter_version):
        return f"{folder} was made by another version"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size:,} bytes, expected {size:,}"
    return None
