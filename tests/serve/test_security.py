"""What strangers may try: each is refused with one line, and the server goes on."""

import base64
import http.client
import http.server
import io
import json
import pickle
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import soundfile
import torch
from PIL import Image

from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.serve import decode_worker
from unimoe.serve.decode_worker import DecodeRequest
from unimoe.serve.media import MediaLimits, MediaReader
from unimoe.serve.protocol import Message, Url, VideoPart

ASK = [{"role": "user", "content": "What is this?"}]


def refusal(client, kind, value, where="url"):
    """The message with which a medium is refused."""
    part = {"type": kind, kind: {where: value}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [part]}], max_tokens=2
        )
    return str(error.value)


def look(client, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    return client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [part]}], max_tokens=2
    )


def data_url(content, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(*size, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def test_remote_addresses_are_not_fetched(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        for kind in ("image_url", "audio_url"):
            assert "does not fetch" in refusal(client, kind, f"http://127.0.0.1:{port}/a.png")
        with pytest.raises(BlockingIOError):  # nobody has called
            listener.accept()


class Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(8, 8) if self.path == "/a.png" else bytes(2000))

    def log_message(self, *_):
        pass


def test_hosts_that_are_allowed_are_fetched_from_without_following_redirects(serving):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as host:
        threading.Thread(target=host.serve_forever).start()
        url = f"http://127.0.0.1:{host.server_port}"
        try:
            with serving(media=MediaLimits(hosts=["127.0.0.1"], media_bytes=1000)) as server:
                assert look(server.client, f"{url}/a.png").usage.completion_tokens == 2
                assert "302" in refusal(server.client, "image_url", f"{url}/moved")
                assert "1,000 bytes" in refusal(server.client, "image_url", f"{url}/large")
                other = f"http://localhost:{host.server_port}/a.png"
                assert "does not fetch" in refusal(server.client, "image_url", other)
        finally:
            host.shutdown()


def test_files_are_refused(client, tmp_path):
    (tmp_path / "a.png").write_bytes(png(8, 8))
    for url in (f"file://{tmp_path}/a.png", "file:///etc/passwd", str(tmp_path / "a.png"), "ftp://a/b"):
        assert "expected a data URL" in refusal(client, "image_url", url)


def test_files_below_the_root_are_read_and_no_others(serving, tmp_path):
    root = tmp_path / "open"
    root.mkdir()
    for folder in (root, tmp_path):
        (folder / "a b.png").write_bytes(png(8, 8))
    (root / "link.png").symlink_to(tmp_path / "a b.png")
    with serving(media=MediaLimits(root=root)) as server:
        assert look(server.client, f"file://{root}/a%20b.png").usage.completion_tokens == 2
        for path in (
            f"{root}/../a%20b.png",
            f"{root}/%2e%2e/a%20b.png",
            f"{root}/link.png",
            f"{root}/%00",
            f"{root}/none.png",
            str(root),
            "/etc/passwd",
        ):
            assert "does not read that file" in refusal(server.client, "image_url", f"file://{path}")
        assert "does not read" in refusal(server.client, "image_url", f"file://other{root}/a%20b.png")


@pytest.mark.parametrize("size", [(16_000, 16_000), (9_000, 9_000), (100_000, 1)])
def test_images_that_are_too_large_are_not_decoded(size, monkeypatch):
    def decode(self, *args):
        raise AssertionError("decoded")

    content = png(*size, mode="1")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    request = DecodeRequest("image", "x", 50_000_000, 16_384, 1.0)
    with pytest.raises(UserError, match="pixels; at most 50,000,000"):
        decode_worker.decode(request, content)


@pytest.mark.parametrize(
    "content", [b"", b"no picture", png(8, 8)[:40], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_no_picture(client, content):
    assert "messages" in refusal(client, "image_url", data_url(content))


def test_playlists_do_not_make_the_server_fetch(server):
    """FFmpeg would follow them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        reader = server.service.media
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/a.ts"
        content = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{address}\n#EXT-X-ENDLIST\n".encode()
        part = VideoPart(type="video_url", video_url=Url(url=data_url(content, "video/mp4")))
        with pytest.raises(UserError, match="expected mp4, webm or avi"):
            reader.read([Message(role="user", content=[part])])
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_base64_that_is_none(client):
    assert "not valid base64" in refusal(client, "image_url", "data:image/png;base64,abc$")
    assert "not valid base64" in refusal(client, "input_audio", "a$c", "data")


def test_sound_that_is_none_and_sound_without_end(client):
    def wav(samples, rate=16000, **how):
        file = io.BytesIO()
        soundfile.write(file, samples, rate, **{"format": "WAV", "subtype": "FLOAT", **how})
        return base64.b64encode(file.getvalue()).decode()

    assert "not finite" in refusal(client, "input_audio", wav(np.full(8000, np.nan)), "data")
    silence = wav(np.zeros(8000 * 3600), 8000, format="FLAC", subtype="PCM_16")  # an hour
    assert len(silence) < 1_000_000
    assert "longer than the 300 seconds" in refusal(client, "input_audio", silence, "data")
    assert "cannot decode" in refusal(client, "input_audio", base64.b64encode(b"RIFF").decode(), "data")


def test_a_kind_of_media_that_the_model_does_not_take():
    parts = [VideoPart(type="video_url", video_url=Url(url=data_url(b"x", "video/mp4")))]
    with pytest.raises(UserError, match="takes no video; it takes text, image"):
        MediaReader({"image": None}, MediaLimits()).read([Message(role="user", content=parts)])


def test_more_media_than_one_request_may_hold(client):
    part = {"type": "image_url", "image_url": {"url": data_url(png(8, 8))}}
    with pytest.raises(openai.BadRequestError, match="at most 32"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part] * 33}])


@pytest.mark.parametrize("text", ["a" * 100_000, "word " * 1_000_000])
def test_a_prompt_that_is_too_long(client, text):
    with pytest.raises(openai.BadRequestError, match="at most 4096") as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}])
    assert error.value.code == "context_length_exceeded"


def post(server, body, **headers):
    headers = {"content-type": "application/json", **headers}
    return httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)


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
        assert look(server.client, data_url(png(8, 8))).usage.completion_tokens == 2


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"messages": ' + b'[{"content": ' * 50_000,
        b'{"x":' * 5000 + b"1" + b"}" * 5000,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
        b"\xff\xfe",
        b"",
        b"null",
    ],
)
def test_bodies_that_are_no_request(server, body):
    reply = post(server, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_text_with_half_a_character(server):
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}'
    assert post(server, body).status_code == 200
    assert post(server, body.replace(b"user", b"\\ud800")).status_code == 400
    assert post(server, body.replace(b"{", b'{"model": "\\ud800", ', 1)).status_code == 404


def test_placeholders_that_somebody_types_are_text(client):
    asked = [{"role": "user", "content": "<image> <|im_end|> <speech>"}]
    assert client.chat.completions.create(model="tiny", messages=asked, max_tokens=2).usage


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


def test_nothing_is_unpickled_while_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_model(tmp_path, hub=False)
    monkeypatch.undo()
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no file named model.safetensors"):
        load_model(tmp_path, hub=False)


def error_of(server, **fields):
    body = {"messages": ASK, "max_tokens": 2, **fields}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=100)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error" and "function-after" not in error["message"]
    return error


def content(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        (content({"type": "input_text", "text": "x"}), "messages[0].content[0]", "one of text, image_url"),
        (content({"text": "x"}), "messages[0].content[0]", "one of text, image_url"),
        (content({"type": "text"}), "messages[0].content[0].text", "required"),
        (content({"type": "image_url", "image_url": {}}), "messages[0].content[0].image_url.url", "required"),
        (content({"type": "image_url", "image_url": "data:;base64,AAAA"}), "messages[0].content[0]", "read"),
        (
            content({"type": "input_audio", "input_audio": {"data": 3}}),
            "messages[0].content[0].input_audio.data",
            "",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "list of parts, found null",
        ),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role", "found 'judge'"),
        ({"messages": []}, "messages", "at least 1"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": 3}, "stop", "a list of strings"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 10**9}, "max_tokens", "leaves room for"),
        ({"tools": [{}]}, "tools", "does not support it"),
        ({"generation_config": '{"top_k": -5}'}, "generation_config.top_k", "greater than"),
    ],
)
def test_an_error_names_the_field(server, fields, param, said):
    error = error_of(server, **fields)
    assert error["param"] == param and said in error["message"] and error["message"].startswith(param)


@pytest.mark.parametrize(
    "url",
    [
        "http://[",
        "file://[",
        "http://[zz]/a.png",
        "http://127.0.0.1:abc/a.png",
        "http://",
        "",
        "data:",
        "a\0b",
    ],
)
def test_urls_that_do_not_parse(server, url):
    error = error_of(server, **content({"type": "image_url", "image_url": {"url": url}}))
    assert error["param"] == "messages[0].content[0]"


class Odd(http.server.BaseHTTPRequestHandler):
    """Replies that are no HTTP, cut off, or too long."""

    def do_GET(self):
        if self.path == "/bad":
            self.wfile.write(b"NOT HTTP AT ALL\r\n\r\n")
        elif self.path == "/cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nabc")
        elif self.path == "/many":
            head = b"".join(b"X-%d: 1\r\n" % number for number in range(300))
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        elif self.path == "/slow":
            for _ in range(200):
                self.wfile.write(b"H")
                time.sleep(0.2)
        elif self.path == "/a%20b%C3%BC.png":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + png(8, 8))

    def log_message(self, *_):
        pass


def test_what_allowed_hosts_may_reply(serving):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as host:
        host.daemon_threads = True
        threading.Thread(target=host.serve_forever).start()
        url = f"http://127.0.0.1:{host.server_port}"
        try:
            with serving(media=MediaLimits(hosts=["127.0.0.1"], fetch_seconds=8.0)) as server:
                for path in ("/bad", "/cut", "/many", "/slow"):
                    error = error_of(
                        server, **content({"type": "image_url", "image_url": {"url": url + path}})
                    )
                    assert "cannot be fetched" in error["message"]
                for path in ("/a bü.png", "/a%20b%C3%BC.png"):
                    assert look(server.client, url + path).usage.completion_tokens == 2
        finally:
            host.shutdown()


def test_a_body_with_another_content_type(server):
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}'
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        error = post(server, body, **{"content-type": kind}).json()["error"]
        assert error["message"] == f"the Content-Type is {kind!r}, expected application/json"
        assert error["param"] is None
    broken = post(server, body[:-1] + b",}").json()["error"]
    assert broken["message"].startswith("the body is not JSON: ") and broken["param"] is None


def test_one_model_by_its_name_and_monitors(server):
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        server.client.models.retrieve("huge")
    assert error.value.code == "model_not_found"
    reply = httpx.head(f"{server.url}/health")
    assert reply.status_code == 200 and not reply.content


def test_a_monitor_without_a_host_header_is_no_web_page(serving):
    with serving(trusted_hosts=["127.0.0.1", "::1"]) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        for name, status in (("[::1]:80", 200), ("evil.example", 400), ("127.0.0.1.evil.example", 400)):
            assert httpx.get(f"{server.url}/health", headers={"host": name}).status_code == status


def test_pages_of_allowed_origins_may_use_the_server(serving):
    page, other = "https://chat.example", "https://evil.example"
    with serving(cors_origins=[page], api_key="k") as server:
        headers = {"origin": page, "access-control-request-method": "POST"}
        headers["access-control-request-headers"] = "authorization,content-type"
        reply = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == page
        refused = httpx.get(f"{server.url}/v1/models", headers={"origin": page})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page
        assert (
            "access-control-allow-origin"
            not in httpx.get(f"{server.url}/health", headers={"origin": other}).headers
        )
