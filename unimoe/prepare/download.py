"""Download a file of known size, resume a partial download, check the hash."""

import errno
import http.client
import logging
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from unimoe.errors import UserError
from unimoe.files import file_hash

from .network import ask, reason, shown

BLOCK = 1 << 18  # bytes read at a time
TRIES = 5  # consecutive attempts without a new byte
PAUSE = 1.0  # seconds before the second attempt, doubled each time

log = logging.getLogger(__name__)


def download(
    url: str,
    target: Path,
    size: int,
    progress: Callable[[int], None] = lambda done: None,
    certificates: str | None = None,
) -> None:
    """Fetch ``size`` bytes of ``url`` to ``target`` through ``target`` + ".part", which a later run resumes.

    ``progress`` receives the number of bytes so far; ``certificates`` as for :func:`ask`. The content is not
    verified, see :func:`check_hash`.

    Raises:
        UserError: the server refuses, the connection fails repeatedly, or the disk is full; the .part file
            is kept.
    """
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while (have := _length(part)) < size:
        try:
            _request(url, part, have, size, progress, certificates)
            problem = "the connection closed early"
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # what we have is longer than what the server has
                part.unlink()
            elif error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{target.name}: {problem} for {shown(url)}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space left on the disk while writing {part}: {size - _length(part):,} bytes to go; "
                    "free some and run the same command again, or set UNIMOE_CACHE to another disk"
                ) from error
            problem = reason(error)
        except http.client.HTTPException as error:
            problem = repr(error)
        now = _length(part)
        if now >= size:
            break
        failures = 1 if now > have else failures + 1
        if failures >= TRIES:
            raise UserError(
                f"{target.name}: interrupted at {now:,} of {size:,} bytes ({problem}, {shown(url)}); "
                "run the same command again to resume"
            )
        log.info("%s: %s at %s of %s bytes, trying again", target.name, problem, f"{now:,}", f"{size:,}")
        time.sleep(PAUSE * 2 ** (failures - 1))
    part.replace(target)


def _length(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _request(
    url: str, part: Path, have: int, size: int, progress: Callable[[int], None], certificates: str | None
) -> None:
    """One request: append to ``part`` from byte ``have``, or rewrite it if the server ignores ranges."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    with ask(url, headers, certificates) as response:
        begin = response.headers.get("Content-Range", "")
        continues = response.status == 206 and begin.startswith(f"bytes {have}-")
        have = have if continues else 0
        with part.open("ab" if continues else "wb") as file:
            while have < size and (block := response.read(min(BLOCK, size - have))):
                file.write(block)
                have += len(block)
                progress(have)


def check_hash(file: Path, sha256: str, remove: bool) -> None:
    """Compare the SHA-256 of ``file`` with ``sha256``; a wrong file is deleted if ``remove``.

    Raises:
        UserError: they differ.
    """
    found = file_hash(file)
    if found != sha256:
        if remove:
            file.unlink()
        advice = "it was removed, run the same command to fetch it again" if remove else "replace it"
        raise UserError(f"{file}: found SHA-256 {found}, expected {sha256}; {advice}")
