import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.errors import UserError
from unimoe.serve import decode_worker
from unimoe.serve.decode_worker import DecodeRequest


def png(*size, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", [(16_000, 16_000), (9_000, 9_000), (100_000, 1)])
def test_images_that_are_too_large_are_not_decoded(size, monkeypatch):
    def decode(self, *args):
        raise AssertionError("decoded")

    content = png(*size, mode="1")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    request = DecodeRequest("image", "x", 50_000_000, 16_384, 1.0)
    with pytest.raises(UserError, match="pixels; at most 50,000,000"):
        decode_worker.decode(request, content)


def wav(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.full(int(16_000 * seconds), 0.25), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def test_audio_may_be_as_long_as_the_limit_and_no_longer():
    request = DecodeRequest("audio", "messages[1]", 1, 1, 0.5)
    ((samples, seconds),) = decode_worker.decode(request, wav(0.5))
    assert samples.shape == (8000,) and (samples == 0.25).all() and seconds is None
    with pytest.raises(UserError, match=r"messages\[1\]: the audio is longer than the 0.5 seconds that are"):
        decode_worker.decode(request, wav(0.51))


def test_images_are_scaled_down_only():
    for longest, expected in ((None, (30, 40, 3)), (20, (15, 20, 3)), (100, (30, 40, 3))):
        request = DecodeRequest("image", "x", 10_000, 100, 1.0, longest)
        ((pixels, _),) = decode_worker.decode(request, png(40, 30))
        assert pixels.shape == expected and pixels.dtype == np.uint8


def test_the_process_answers_one_request_after_the_other(monkeypatch):
    """A request that fails is answered in one line, and the next one is read from the right place."""

    def ask(where, content):
        header = DecodeRequest("image", where, 100, 100, 1.0).to_json()
        return json.dumps({**header, "size": len(content)}).encode() + b"\n" + content

    asked = ask("first", b"junk\n{}") + ask("second", png(20, 20)) + ask("third", png(2, 1))
    answers = io.BytesIO()
    monkeypatch.setattr(decode_worker.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(asked)))
    monkeypatch.setattr(decode_worker.sys, "stdout", SimpleNamespace(buffer=answers))
    monkeypatch.setattr(decode_worker.sys, "argv", ["", str(1 << 30)])
    monkeypatch.setattr(decode_worker, "_limit_memory", lambda extra: None)
    decode_worker.main()
    lines = answers.getvalue().split(b"\n", 4)
    assert lines[0] == b"ready"
    assert json.loads(lines[1])["error"].startswith("first: the image cannot be read; expected one of")
    assert json.loads(lines[2])["error"] == (
        "second: the image has 20 x 20 pixels; at most 100 are accepted, and 100 on a side"
    )
    assert json.loads(lines[3]) == {"items": [{"shape": [1, 2, 3], "dtype": "uint8", "seconds": None}]}
    assert lines[4] == bytes(6)  # two black pixels
