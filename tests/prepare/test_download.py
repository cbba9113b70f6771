"""Downloads over a loopback server that can break off, refuse ranges or answer with errors."""

import errno
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unimoe.errors import UserError
from unimoe.prepare import download as module
from unimoe.prepare.download import check_hash, download

DATA = bytes(range(256)) * 4096  # 1 MiB


class Server(ThreadingHTTPServer):
    """Serves DATA; ``plan`` says for each request how many bytes it gets, or the status of an error."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[tuple[str, int]] = []
        self.starts: list[int] = []  # byte from which each request was answered
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}/file.whl"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        kind, number = self.server.plan.pop(0) if self.server.plan else ("send", len(DATA))
        if kind == "status":
            self.send_error(number)
            return
        asked = self.headers.get("Range", "bytes=0-") if self.server.ranges else "bytes=0-"
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        self.server.starts.append(start)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        self.wfile.write(DATA[start : start + number])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE", 0.001)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=10)


@pytest.mark.timeout(30)
def test_goes_on_where_the_connection_broke(server: Server, tmp_path: Path):
    server.plan = [("send", 300_000), ("status", 503), ("send", 400_000)]
    seen = []
    download(server.url, tmp_path / "file.whl", len(DATA), seen.append)
    assert (tmp_path / "file.whl").read_bytes() == DATA
    assert server.starts == [0, 300_000, 700_000]
    assert seen == sorted(seen) and seen[-1] == len(DATA)
    assert not (tmp_path / "file.whl.part").exists()


@pytest.mark.timeout(30)
def test_a_later_run_goes_on(server: Server, tmp_path: Path):
    server.plan = [("send", 500_000), *[("status", 503)] * module.TRIES]
    with pytest.raises(UserError, match=r"500,000 of 1,048,576 bytes \(HTTP 503"):
        download(server.url, tmp_path / "file.whl", len(DATA))
    assert (tmp_path / "file.whl.part").stat().st_size == 500_000
    assert not (tmp_path / "file.whl").exists()
    server.plan = []
    download(server.url, tmp_path / "file.whl", len(DATA))
    assert (tmp_path / "file.whl").read_bytes() == DATA
    assert server.starts == [0, 500_000]


@pytest.mark.timeout(30)
def test_starts_anew_on_a_server_without_ranges(server: Server, tmp_path: Path):
    server.ranges = False
    server.plan = [("send", 300_000)]
    download(server.url, tmp_path / "file.whl", len(DATA))
    assert (tmp_path / "file.whl").read_bytes() == DATA
    assert server.starts == [0, 0]


@pytest.mark.timeout(30)
def test_a_refusal_is_final(server: Server, tmp_path: Path):
    server.plan = [("status", 403)]
    with pytest.raises(UserError, match=r"file\.whl: HTTP 403"):
        download(server.url, tmp_path / "file.whl", len(DATA))
    assert not server.plan and not server.starts


@pytest.mark.timeout(30)
def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "PAUSE", 0.001)
    with Server() as closed:
        url = closed.url
    with pytest.raises(UserError, match=r"interrupted at 0 of .* bytes .*refused"):
        download(url.replace("//", "//me:secret@"), tmp_path / "file.whl", len(DATA))


@pytest.mark.timeout(30)
def test_password_is_not_shown(server: Server, tmp_path: Path):
    server.plan = [("status", 401)]
    with pytest.raises(UserError) as info:
        download(server.url.replace("//", "//me:secret@"), tmp_path / "file.whl", len(DATA))
    assert "secret" not in str(info.value)


@pytest.mark.timeout(30)
def test_disk_full_while_downloading(server: Server, tmp_path: Path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_request", full)
    with pytest.raises(UserError, match=r"no space left on the disk .* 1,048,576 bytes to go"):
        download(server.url, tmp_path / "file.whl", len(DATA))


def test_wrong_hash_names_both_and_removes_the_file(tmp_path: Path):
    file = tmp_path / "file.whl"
    file.write_bytes(b"other")
    found, expected = hashlib.sha256(b"other").hexdigest(), "0" * 64
    with pytest.raises(UserError, match=f"file.whl: found SHA-256 {found}, expected {expected}; replace it"):
        check_hash(file, expected, remove=False)
    with pytest.raises(UserError, match=f"found SHA-256 {found}, expected {expected}; it was removed"):
        check_hash(file, expected, remove=True)
    assert not file.exists()
