"""Media of requests: what is read, from where, and what is refused with one line."""

import base64
import http.server
import io
import socket
import threading
import time

import numpy as np
import openai
import pytest
import soundfile
from PIL import Image

from unimoe.errors import UserError
from unimoe.serve.media import MediaLimits, MediaReader
from unimoe.serve.protocol import Message, Url, VideoPart


def refusal(client, kind, value, where="url"):
    """The message with which an image, a video or audio is refused."""
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
def test_urls_that_do_not_parse(server, error_of, url):
    error = error_of(server, {"type": "image_url", "image_url": {"url": url}})
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


def test_what_allowed_hosts_may_reply(serving, error_of):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as host:
        host.daemon_threads = True
        threading.Thread(target=host.serve_forever).start()
        url = f"http://127.0.0.1:{host.server_port}"
        try:
            with serving(media=MediaLimits(hosts=["127.0.0.1"], fetch_seconds=4.0)) as server:
                for path in ("/bad", "/cut", "/many", "/slow"):
                    error = error_of(server, {"type": "image_url", "image_url": {"url": url + path}})
                    assert "cannot be fetched" in error["message"]
                for path in ("/a bü.png", "/a%20b%C3%BC.png"):
                    assert look(server.client, url + path).usage.completion_tokens == 2
        finally:
            host.shutdown()
