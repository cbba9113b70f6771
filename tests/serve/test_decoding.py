"""The decoding processes: what they return, and what ends them."""

import base64
import io
import subprocess
import threading
import time

import httpx
import numpy as np
import pytest
import soundfile
from PIL import Image, PngImagePlugin

from unimoe.errors import UserError
from unimoe.media.image import load_image
from unimoe.media.video import load_video, write_video
from unimoe.serve.decode_worker import DecodeRequest
from unimoe.serve.decoding import DecodePool
from unimoe.serve.media import MediaLimits

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def pool():
    pool = DecodePool(1, seconds=120)
    yield pool
    pool.close()


def request(modality="image", **fields):
    return DecodeRequest(modality, "messages[0]", 50_000_000, 16_384, 2.0, **fields)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def data_url(content):
    return "data:image/png;base64," + base64.b64encode(content).decode()


def test_what_a_process_decodes_is_what_this_one_would(pool, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    for format in ("PNG", "JPEG", "AVIF", "WEBP", "JPEG2000", "PPM"):
        content = encoded(Image.fromarray(noise), format)
        image = pool.decode(request(longest=100), content)["image"]
        assert image.tobytes() == load_image({"type": "image", "bytes": content}, "x", 100).tobytes()
    write_video(tmp_path / "a.mp4", [Image.new("RGB", (64, 48), (20 * n, 0, 0)) for n in range(10)], 5)
    content = (tmp_path / "a.mp4").read_bytes()
    frames = pool.decode(request("video", frames=4), content)["video"]
    expected = load_video({"type": "video", "bytes": content}, "x", 4)
    assert [f.tobytes() for f in frames] == [f.tobytes() for f in expected]
    assert [f.info["seconds"] for f in frames] == [f.info["seconds"] for f in expected]
    wave = io.BytesIO()
    soundfile.write(wave, 0.1 * np.ones(16000), 16000, format="WAV", subtype="FLOAT")
    samples = pool.decode(request("speech"), wave.getvalue())["speech"]
    assert samples.dtype == np.float32 and np.allclose(samples, 0.1)


def refusal(pool, content, **fields):
    with pytest.raises(UserError) as caught:
        pool.decode(request(**fields), content)
    message = str(caught.value)
    assert message.startswith("messages[0]: ") and "\n" not in message
    return message


def test_limits_of_a_file(pool):
    assert "cannot be read; expected one of the formats AVIF" in refusal(pool, b"junk")
    wide = encoded(Image.new("1", (20_000, 1)))
    assert "has 20000 x 1 pixels; at most 50,000,000" in refusal(pool, wide)
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 2_000_000, zip=True)
    assert pool.decode(request(), encoded(Image.new("RGB", (8, 8)), pnginfo=text))["image"].size == (8, 8)
    plain = encoded(Image.new("RGB", (4000, 4000), "red"), "JPEG", progressive=True)
    many = plain[:-2] + plain[plain.rindex(b"\xff\xda") : -2] * 300 + b"\xff\xd9"
    start = time.monotonic()
    assert "scans of 4000 x 4000 pixels; save it again" in refusal(pool, many)
    assert pool.decode(request(longest=64), plain)["image"].size == (64, 64)
    assert time.monotonic() - start < 60  # the scans alone would take longer


def test_a_process_that_takes_too_much_memory_or_time_is_replaced():
    large = encoded(Image.new("RGB", (7000, 7000)), compress_level=1)
    small = encoded(Image.new("RGB", (8, 8)))
    narrow = DecodePool(1, seconds=120, memory_bytes=60 << 20)
    try:
        assert "decode" in refusal(narrow, large)
        assert narrow.decode(request(), small)["image"].size == (8, 8)
        narrow.seconds = 0.01
        assert "takes more than 0.01 s to decode" in refusal(narrow, large)
        narrow.seconds = 120
        assert narrow.decode(request(), small)["image"].size == (8, 8)
        process = narrow._workers[0]._process
    finally:
        narrow.close()
    assert process.poll() is not None


def test_a_closed_pool_starts_no_process_for_what_waited():
    pool = DecodePool(1, seconds=120)
    worker, errors = pool._idle.get(), []  # as if another request had it

    def wait():
        with pytest.raises(UserError, match="shutting down") as caught:
            pool.decode(request(), b"")
        errors.append(caught.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    pool.close()
    pool._idle.put(worker)
    waiting.join()
    assert errors and worker._process is None


def test_a_process_that_starts_while_its_pool_is_closed_ends(monkeypatch):
    pool, started, start = DecodePool(1, seconds=120), [], subprocess.Popen
    closing = threading.Thread(target=pool.close)

    def late(*given, **named):
        closing.start()
        closing.join(0.2)  # without a lock it ends here, and finds no process
        started.append(start(*given, **named))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", late)
    with pytest.raises(UserError, match="shutting down"):
        pool.decode(request(), b"")
    closing.join()
    assert started[0].poll() is not None and pool._workers[0]._process is None


def test_small_files_that_are_large_or_slow(serving, watched):
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
