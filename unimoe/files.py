"""Files: written so that an interrupted run leaves either the old result or the new one, never a part."""

import base64
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def new_folder(path: str | Path, flag: str = "--output") -> Path:
    """The folder of a result, which is not written yet.

    Raises:
        UserError: it holds something.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{flag} {path} is there already; choose a folder that is new or empty")
    return folder


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place when the block ends without an error.

    A folder that stood at ``path`` before is replaced only then. Raises UserError when the disk is full.
    """
    path = Path(path).resolve()  # where a link leads, so that the link stays
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _disk_errors(path):
            yield temporary
            temporary.chmod(0o755)  # mkdtemp makes it private
            if path.exists():
                old = temporary.with_name(temporary.name + ".old")
                path.rename(old)
                temporary.rename(path)
                shutil.rmtree(old)
            else:
                temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock_folder(folder: str | Path, flag: str = "--output") -> Iterator[None]:
    """Hold ``folder``, which need not exist, for this process inside the block.

    Raises:
        UserError: another process holds it. ``flag`` names the setting to change.
    """
    folder = Path(folder).resolve()
    path = folder.with_name(f".{folder.name}.lock")
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"{folder} is in use by another run; wait for it to end or choose another {flag}"
            ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; what the block writes there takes the place of ``path`` when it ends well.

    Raises UserError when the disk is full.
    """
    path = Path(path)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` by way of a temporary file.

    Raises UserError when the disk is full.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*content: "str | bytes | Tensor") -> str:
    """SHA-256, hexadecimal, of all ``content`` in order: text as UTF-8, tensors as their bytes."""
    digest = hashlib.sha256()
    for item in content:
        if isinstance(item, str):
            digest.update(item.encode())
        elif isinstance(item, bytes):
            digest.update(item)
        else:
            digest.update(_bytes(item))
    return digest.hexdigest()


def _bytes(tensor: "Tensor") -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def data_url(kind: str, content: bytes) -> str:
    """``content`` of the MIME type ``kind`` as an address that holds it whole."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk while writing {path}; free some or choose another folder"
            ) from error
        if error.errno in _UNWRITABLE:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        raise
