"""Downloading a file of known hash, going on where an earlier try broke off."""

import errno
import hashlib
import http.client
import logging
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path

from unimoe.errors import UserError

from .network import ask, reason, shown

BLOCK = 1 << 20  # bytes read at a time
TRIES = 5  # in a row without a new byte
PAUSE = 1.0  # seconds before the second try, doubled each time

log = logging.getLogger(__name__)


def download(
    url: str,
    target: Path,
    sha256: str,
    size: int,
    progress: Callable[[int], None] = lambda done: None,
    certificates: str | None = None,
) -> None:
    """Fetch ``url`` to ``target`` (``size`` bytes) by way of ``target`` + ".part", which a later run continues.

    ``progress`` is told the bytes there are so far. UserError when the connection breaks for good (the .part stays),
    the server refuses, the disk is full (the .part stays), or the hash is wrong (the file is removed).
    """
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while (have := part.stat().st_size if part.exists() else 0) < size:
        progress(have)
        try:
            _fetch(url, part, have, size, progress, certificates)
            problem = "the connection closed early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise UserError(f"{target.name}: HTTP {error.code} {error.reason} for {shown(url)}") from error
            if error.code == 416:  # the server's file is shorter than what we have
                part.unlink()
            problem = f"HTTP {error.code} {error.reason}"
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
            problem = reason(error) if isinstance(error, OSError) else repr(error)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space left on the disk while writing {part}; free {size - part.stat().st_size:,} bytes and run "
                    "the same command again, or set UNIMOE_CACHE to a folder on another disk"
                ) from error
            raise
        now = part.stat().st_size if part.exists() else 0
        if now >= size:
            break
        failures = 1 if now > have else failures + 1
        if failures >= TRIES:
            raise UserError(
                f"{target.name}: download broke off at {now:,} of {size:,} bytes ({problem}, {shown(url)}); "
                "run the same command again to go on from there"
            )
        log.info("%s: %s at %s of %s bytes, trying again", target.name, problem, f"{now:,}", f"{size:,}")
        time.sleep(PAUSE * 2 ** (failures - 1))
    progress(size)
    check_hash(part, sha256, target.name)
    part.replace(target)


def _fetch(
    url: str, part: Path, have: int, size: int, progress: Callable[[int], None], certificates: str | None
) -> None:
    """One request: append to ``part`` what comes, from byte ``have`` on if the server can."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    with ask(url, headers, certificates) as response:
        continues = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if continues else 0  # a server without ranges sends everything from the start
        with part.open("ab" if continues else "wb") as file:
            while have < size and (block := response.read(min(BLOCK, size - have))):
                file.write(block)
                have += len(block)
                progress(have)


def check_hash(file: Path, sha256: str, name: str, remove: bool = True) -> None:
    """UserError when ``file`` has not the SHA-256 ``sha256``; the bad file is then removed if ``remove``."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        if remove:
            file.unlink()
        gone = "; it was removed, run the same command again" if remove else f"; replace {file}"
        raise UserError(f"{name}: found SHA-256 {found}, expected {sha256}{gone}")
