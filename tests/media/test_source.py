import base64
import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.errors import UserError
from unimoe.media.source import bare_base64, data_url_bytes, decode_base64, media_format, open_media

CONTENT = bytes(range(256)) * 3
TEXT = base64.b64encode(CONTENT).decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;base64,{TEXT}",
        f"data:image/png;BASE64,{TEXT}",
        f"data:image/png; base64,{TEXT}",
        f"data:image/png;charset=utf-8 ; base64 ,{TEXT}",
        f"data:;base64,{TEXT}",
        f"Data:image/png;base64,{TEXT[:100]}\r\n {TEXT[100:]}\n",
        f"data:image/png;base64,{TEXT.replace('+', '-').replace('/', '_')}",
        f"data:image/png;base64,{TEXT.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}",
        f"data:image/png;base64,{TEXT.rstrip('=')}",
        "data:application/octet-stream," + "".join(f"%{byte:02x}" for byte in CONTENT),
    ],
)
def test_every_spelling_of_a_data_url(url):
    assert data_url_bytes(url, "f:1") == CONTENT


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,???", "data:image/png;base64,AAAAA", "data:image/png"]
)
def test_what_is_no_data_url_is_said_in_one_short_line(url):
    with pytest.raises(UserError, match=r"^f:1: .*(not valid base64|not a data URL)") as caught:
        data_url_bytes(url, "f:1")
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_base64_without_padding_of_every_length():
    for size in range(6):
        assert decode_base64(base64.b64encode(CONTENT[:size]).decode().rstrip("=")) == CONTENT[:size]


def encoded(save):
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


PNG = encoded(lambda file: Image.new("RGB", (9, 9), "red").save(file, "PNG"))


def test_bare_base64_of_a_media_file_is_told_from_a_path():
    assert bare_base64(base64.b64encode(PNG).decode()) == PNG
    assert bare_base64(base64.encodebytes(PNG).decode()) == PNG
    assert bare_base64(TEXT) is None  # no media
    assert bare_base64("train/0001/photos/" + "a" * 40) is None
    assert bare_base64("iVBORw0K") is None  # too short for anything


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000"])
def test_images_by_their_first_bytes(format):
    content = encoded(lambda file: Image.new("RGB", (9, 9)).save(file, format))
    assert media_format(content[:256]) == "image"


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"])
def test_audio_by_its_first_bytes(format):
    content = encoded(lambda file: soundfile.write(file, np.zeros(8000), 8000, format=format))
    assert media_format(content[:256]) == "audio"


def test_other_files_have_no_format():
    for head in (b"", b"{", b"%PDF-1.7", b"PK\x03\x04", b"hello, this is text", b"<svg>"):
        assert media_format(head) is None


def test_paths_that_cannot_exist_are_one_line():
    for path in ("a\0b.png", "a" * 5000):
        with pytest.raises(UserError, match="^f:1: cannot read ") as caught:
            open_media({"type": "image", "path": path}, "f:1")
        assert "\n" not in str(caught.value)
