"""Connections that send no request, on a local server, bounded in number and time."""

import time

import httpx

from unimoe.serve.connections import DeadlineProtocol


def reply_to(connection) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionError:
        return b""


def test_connections_that_send_half_a_header(serving, monkeypatch, watched, connect):
    monkeypatch.setattr(DeadlineProtocol, "most", 20)
    monkeypatch.setattr(DeadlineProtocol, "header_seconds", 2.0)
    with serving() as server, watched(server):
        held = [connect(server) for _ in range(100)]  # five times as many as it has room for
        for connection in held:
            try:
                connection.sendall(b"GET /he")
            except ConnectionError:
                pass
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        start = time.monotonic()
        assert all(reply_to(connection) == b"" for connection in held)  # closed, by number or by time
        assert time.monotonic() - start < 60
        for connection in held:
            connection.close()


def test_a_header_without_end(serving, watched, connect):
    with serving() as server, watched(server) as found, connect(server) as attacker:
        try:
            attacker.sendall(b"GET /health HTTP/1.1\r\n")
            for number in range(2000):
                attacker.sendall(b"X-%d: " % number + b"a" * 8000 + b"\r\n")
        except ConnectionError:
            pass
        else:
            raise AssertionError("16 MB of header were accepted")
    assert found["most"] - found["before"] < 60
