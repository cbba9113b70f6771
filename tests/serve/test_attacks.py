"""Attacks on a local server, bounded in number and time: it refuses them, and answers others meanwhile."""

import base64
import io
import json
import os
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from PIL import Image

from unimoe.serve.connections import DeadlineProtocol
from unimoe.serve.media import MediaLimits

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def resident() -> int:
    """Megabytes of this process, in which the server of these tests runs."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


@contextmanager
def watched(server):
    """Ask as an honest client all the while; gives how long the answers took, and the largest memory."""
    found = {"seconds": [], "most": resident(), "before": resident()}
    end = threading.Event()

    def ask():
        while not end.is_set():
            start = time.monotonic()
            reply = httpx.post(f"{server.url}/v1/chat/completions", json=ASK, timeout=60)
            assert reply.status_code == 200
            found["seconds"].append(time.monotonic() - start)
            end.wait(0.1)

    def look():
        while not end.is_set():
            found["most"] = max(found["most"], resident())
            end.wait(0.02)

    threads = [threading.Thread(target=ask), threading.Thread(target=look)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert found["seconds"] and max(found["seconds"]) < 60


def connect(server) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def reply_to(connection) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionError:
        return b""


def test_a_body_with_two_lengths_or_more_than_it_announces(serving):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    with serving(body_bytes=1 << 20) as server, watched(server) as found:
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        for lengths in (
            b"Content-Length: 10\r\nTransfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: chunked\r\n",
        ):
            with connect(server) as attacker:
                attacker.sendall(head + lengths + b"\r\n")
                try:
                    for _ in range(100):
                        attacker.sendall(chunk)
                except ConnectionError:
                    pass
                else:
                    raise AssertionError("100 MB were accepted")
    assert found["most"] - found["before"] < 80


def test_json_that_is_small_and_becomes_large(server):
    body = b'{"messages": [' + b"[]," * 2_000_000 + b"[]]}"
    with watched(server) as found:
        headers = {"content-type": "application/json"}
        reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert reply.status_code == 413 and "JSON values" in reply.json()["error"]["message"]
    assert found["most"] - found["before"] < 150


def test_a_body_that_does_not_come(serving):
    with serving(body_seconds=1.0) as server, watched(server), connect(server) as attacker:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        attacker.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        reply = reply_to(attacker)
        assert b" 408 " in reply and b"does not arrive in time" in reply + reply_to(attacker)


def test_connections_that_send_half_a_header(serving, monkeypatch):
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


def test_a_header_without_end(serving):
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


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_small_files_that_are_large_or_slow(serving):
    progressive = encoded(Image.new("RGB", (5000, 5000), "red"), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    files = [
        encoded(Image.new("I;16", (7000, 7000)), compress_level=1),
        encoded(Image.new("LA", (7000, 7000)), compress_level=1),
        progressive[:-2] + scan * 300 + b"\xff\xd9",
    ]
    limits = MediaLimits(decode_processes=1, decode_seconds=60)
    with serving(media=limits) as server:
        part = {"type": "image_url", "image_url": {"url": data_url(encoded(Image.new("RGB", (8, 8))))}}
        body = {**ASK, "messages": [{"role": "user", "content": [part]}]}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=200).status_code == 200
        replies = []

        def attack(content):
            part = {"type": "image_url", "image_url": {"url": data_url(content)}}
            body = {**ASK, "messages": [{"role": "user", "content": [part]}]}
            replies.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300))

        with watched(server) as found:
            threads = [threading.Thread(target=attack, args=(content,)) for content in files * 2]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert len(replies) == 6 and {reply.status_code for reply in replies} <= {200, 400}
    errors = [reply.json()["error"] for reply in replies if reply.status_code == 400]
    assert len(errors) >= 2 and {error["param"] for error in errors} == {"messages[0].content[0]"}
    assert found["most"] - found["before"] < 150  # decoded here they would take 890 MB each


@pytest.mark.parametrize("where", ["content", "url"])
def test_json_nested_deeply(server, where):
    body = json.dumps(ASK).replace('"hi"', "[" * 200_000 if where == "content" else '{"url":' * 100_000)
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
