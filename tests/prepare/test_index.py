"""Finding the pinned file: index pages as JSON, HTML and folders, and what is said when it is not there."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unimoe.errors import UserError
from unimoe.prepare import index as module
from unimoe.prepare.index import Link, Sources, find_link, find_npm_link, find_sources
from unimoe.prepare.parts import PARTS

PART = replace(
    PARTS["sprites"], package="a-font", version="2.0", filename="a_font-2.0-any.whl", sha256="a" * 64
)


def as_json(*files: tuple[str, str]) -> tuple[str, str]:
    listed = [{"filename": name, "url": f"../files/{name}", "hashes": {"sha256": sha}} for name, sha in files]
    return "application/vnd.pypi.simple.v1+json", json.dumps({"files": listed})


@pytest.fixture
def index(monkeypatch):
    """A loopback index whose page of ``a-font`` a test sets; it has no other project."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/simple/a-font/" or not server.page:
                self.send_error(404)
                return
            kind, text = server.page
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        page: tuple[str, str] | None = None

        @property
        def url(self) -> str:
            return f"http://127.0.0.1:{self.server_port}/simple"

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


def test_json_page(index):
    index.page = as_json(("a_font-1.0-any.whl", "b" * 64), (PART.filename, PART.sha256))
    link = find_link(PART, Sources([index.url + "/"]))
    assert link.url == f"{index.url}/files/{PART.filename}"


def test_html_page(index):
    anchor = f'<a href="../../files/{PART.filename}#sha256={PART.sha256}" data-x>{PART.filename}</a>'
    index.page = "text/html", f"<html><body><a>nothing</a>{anchor}</body></html>"
    link = find_link(PART, Sources([index.url]))
    assert (link.filename, link.url) == (
        PART.filename,
        index.url.replace("/simple", f"/files/{PART.filename}"),
    )


def test_the_next_index_is_asked_too_even_a_folder(index, tmp_path: Path):
    (tmp_path / "a-font").mkdir()
    (tmp_path / "a-font" / PART.filename).touch()
    link = find_link(PART, Sources([index.url, tmp_path.as_uri()]))
    assert link.url == (tmp_path / "a-font" / PART.filename).as_uri()


def test_missing_package(index):
    with pytest.raises(UserError, match=r"a-font is not on the package index \(http://127.*--wheels"):
        find_link(PART, Sources([index.url]))


def test_missing_version(index):
    index.page = as_json(("a_font-1.0-any.whl", "b" * 64), ("a_font-1.1.tar.gz", "c" * 64))
    with pytest.raises(
        UserError, match=r"a-font 2\.0 is not on .*: found 1\.0, 1\.1, expected a_font-2\.0-any\.whl"
    ):
        find_link(PART, Sources([index.url]))


def test_another_hash_on_offer(index):
    index.page = as_json((PART.filename, "b" * 64))
    with pytest.raises(UserError, match=f"SHA-256 {'b' * 64}, expected {'a' * 64}"):
        find_link(PART, Sources([index.url]))


def test_network_down(index, tmp_path: Path):
    url = index.url
    index.server_close()
    with pytest.raises(
        UserError, match=r"does not respond .*(refused|reset).*; connect, or give the files with --wheels"
    ):
        find_link(PART, Sources([url.replace("//", "//me:secret@"), tmp_path.as_uri()]))


def test_page_that_is_not_json(index):
    index.page = "application/json", "<html>"
    with pytest.raises(UserError, match="cannot be read"):
        find_link(PART, Sources([index.url]))


def test_certificates_that_are_not_there(index, tmp_path: Path):
    with pytest.raises(UserError, match=r"trusted certificates .*none\.pem: cannot be read"):
        find_link(PART, Sources([index.url], certificates=str(tmp_path / "none.pem")))


def test_pip_is_asked_for_its_index(monkeypatch, tmp_path: Path):
    settings = tmp_path / "pip.conf"
    settings.write_text(
        f"[global]\nindex-url = http://one.invalid/simple\nfind-links = {tmp_path}\n"
        "extra-index-url = http://two.invalid/simple\n  http://three.invalid/simple\n"
    )
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    sources = find_sources()
    assert sources.indexes == [f"http://{name}.invalid/simple" for name in ("one", "two", "three")]
    assert sources.folders == [tmp_path]
    monkeypatch.setenv("PIP_INDEX_URL", "http://four.invalid/simple")
    assert find_sources().indexes[0] == "http://four.invalid/simple"


def test_without_pip(monkeypatch):
    monkeypatch.setattr(module, "_pip_settings", dict)
    monkeypatch.setattr(module, "_pip_default", lambda: None)
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    monkeypatch.setenv("UV_INDEX_URL", "http://uv.invalid/simple")
    assert find_sources().indexes == ["http://uv.invalid/simple"]
    monkeypatch.delenv("UV_INDEX_URL")
    with pytest.raises(UserError, match="no package index is known"):
        find_sources()


def test_npm_is_asked_for_its_registry(monkeypatch, tmp_path: Path):
    part = PARTS["fluent"]
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\n[ "$2" = @lobehub/fluent-emoji-3d@1.1.0 ] && echo "a://b/$3.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_npm_link(part) == Link(part.filename, "a://b/dist.tarball.tgz", None)
    npm.write_text("#!/bin/sh\necho npm error code E404 >&2\necho more >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"1.1.0: npm error code E404; install npm, or give lobehub-.*tgz"):
        find_npm_link(part)
    npm.unlink()
    with pytest.raises(UserError, match="npm is not installed; install npm, or give"):
        find_npm_link(part)
