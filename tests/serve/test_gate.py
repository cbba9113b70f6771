"""What the server refuses before it reads a request: wrong hosts, keys, lengths and times."""

import http.client
import json
import socket

import httpx
import openai
import pytest

ASK = [{"role": "user", "content": "What is this?"}]


def reply_to(connection) -> bytes:
    try:
        return connection.recv(4096)
    except ConnectionError:
        return b""


def post(server, body, **headers):
    headers = {"content-type": "application/json", **headers}
    return httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)


def test_a_body_with_two_lengths_or_more_than_it_announces(serving, watched, connect):
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


def test_json_that_is_small_and_becomes_large(server, watched):
    body = b'{"messages": [' + b"[]," * 2_000_000 + b"[]]}"
    with watched(server) as found:
        headers = {"content-type": "application/json"}
        reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert reply.status_code == 413 and "JSON values" in reply.json()["error"]["message"]
    assert found["most"] - found["before"] < 150


def test_a_body_that_does_not_come(serving, watched, connect):
    with serving(body_seconds=1.0) as server, watched(server), connect(server) as attacker:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        attacker.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        reply = reply_to(attacker)
        assert b" 408 " in reply and b"does not arrive in time" in reply + reply_to(attacker)


def test_a_body_of_200_mb_is_not_read(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(200 << 20))
    connection.endheaders(b"{")  # no more of it is ever sent
    reply = connection.getresponse()
    assert reply.status == 413
    assert json.loads(reply.read())["error"]["type"] == "invalid_request_error"
    connection.close()


def test_nor_one_that_does_not_say_how_long_it_is(serving):
    def endless():
        while True:
            yield b" " * 65536

    with serving(body_bytes=1 << 20) as server:
        try:
            assert post(server, endless()).status_code == 411
        except httpx.TransportError:
            pass  # the server hung up while we were still sending
        answer = server.client.chat.completions.create(model="tiny", messages=ASK, max_tokens=2)
        assert answer.usage.completion_tokens == 2


def test_a_key(serving):
    with serving(api_key="sesame") as server:
        for key in ("none", "sesam", "sesame1"):
            with pytest.raises(openai.AuthenticationError) as error:
                server.client.with_options(api_key=key).chat.completions.create(model="tiny", messages=ASK)
            assert error.value.code == "invalid_api_key"
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert server.client.with_options(api_key="sesame").models.list().data[0].id == "tiny"


def test_web_pages_cannot_use_a_server_on_this_machine(serving):
    """Neither through a name of theirs that points here, nor by a form."""
    with serving(trusted_hosts=["127.0.0.1"]) as server:
        body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}'
        assert post(server, body).status_code == 200
        assert post(server, body, host="evil.example").status_code == 400
        assert post(server, body, **{"content-type": "text/plain"}).status_code == 400
        reply = post(server, body, origin="http://evil.example")
        assert "access-control-allow-origin" not in reply.headers


def test_a_monitor_without_a_host_header_is_no_web_page(serving):
    with serving(trusted_hosts=["127.0.0.1", "::1"]) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        for name, status in (("[::1]:80", 200), ("evil.example", 400), ("127.0.0.1.evil.example", 400)):
            assert httpx.get(f"{server.url}/health", headers={"host": name}).status_code == status
