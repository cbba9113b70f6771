"""Images and videos are told apart by what the files hold."""

import numpy as np
import pytest
from PIL import Image

from unimoe.media.file_type import file_modality


@pytest.mark.parametrize("format", ["PNG", "JPEG", "AVIF", "JPEG2000", "PPM", "WEBP", "GIF", "TIFF", "BMP"])
def test_images_of_every_format_whatever_their_name(tmp_path, format):
    path = tmp_path / "image.dat"
    Image.new("RGB", (20, 10), "red").save(path, format)
    assert file_modality(path) == "image"


@pytest.mark.parametrize("format", ["mp4", "matroska", "avi", "mpegts", "mpeg"])
def test_videos_of_every_container_whatever_their_name(tmp_path, format):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "video.dat"
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream("mpeg2video" if "mpeg" in format else "mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(5):
            grey = np.full((48, 64, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    assert file_modality(path) == "video"


@pytest.mark.parametrize(
    "content", [b"", b"a list of names\n", b'{"images": []}', b"\x00" * 500, b"G" + b"o" * 500]
)
def test_neither(tmp_path, content):
    path = tmp_path / "file.jpg"
    path.write_bytes(content)
    assert file_modality(path) is None
