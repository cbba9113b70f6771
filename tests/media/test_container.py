import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.errors import UserError
from unimoe.media.container import modality
from unimoe.media.video import load_video

av = pytest.importorskip("av")

FORMATS = ["mp4", "matroska", "webm", "mpegts", "mpeg", "asf", "flv", "ogg", "3gp", "avi", "mov"]
CODECS = {"webm": "libvpx", "ogg": "libvpx", "mpeg": "mpeg1video", "asf": "wmv2", "flv": "flv", "3gp": "h263"}


def video(name):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=name) as container:
        stream = container.add_stream(CODECS.get(name, "mpeg4"), rate=25 if name == "mpeg" else 10)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for number in range(20):
            picture = Image.new("RGB", (176, 144), (12 * number, 0, 0))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_videos_are_told_and_decoded_by_content(name, tmp_path):
    path = tmp_path / "clip.txt"
    path.write_bytes(video(name))
    part = {"type": "video", "path": str(path)}
    assert modality(part, "f:1") == "video"
    frames = load_video(part, "f:1", frames=4)
    reds = [np.asarray(frame)[..., 0].mean() for frame in frames]
    assert len(frames) == 4 and reds == sorted(reds) and reds[-1] - reds[0] > 150


def audio_in(name, codec):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=name) as container:
        stream = container.add_stream(codec, rate=48000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 48000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(("name", "codec"), [("mp4", "aac"), ("webm", "libopus"), ("ogg", "libopus")])
def test_audio_alone_in_a_container_of_films(name, codec):
    assert modality({"type": "video", "bytes": audio_in(name, codec)}, "f:1") == "audio"


def test_images_audio_and_text():
    image, wave = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "AVIF")
    soundfile.write(wave, np.zeros(800), 8000, format="WAV")
    assert modality({"type": "image", "bytes": image.getvalue()}, "f:1") == "image"
    assert modality({"type": "audio", "bytes": wave.getvalue()}, "f:1") == "audio"
    assert modality({"type": "image", "bytes": b"some text\n" * 9}, "f:1") is None


def test_a_playlist_opens_nothing(tmp_path):
    (tmp_path / "secret.ts").write_bytes(video("mpegts"))
    playlist = f"#EXTM3U\n#EXTINF:1,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n".encode()
    with pytest.raises(UserError, match="cannot decode the video"):
        load_video({"type": "video", "bytes": playlist}, "f:1")
    concat = f"ffconcat version 1.0\nfile {tmp_path}/secret.ts\n".encode()
    with pytest.raises(UserError, match="cannot decode the video"):
        load_video({"type": "video", "bytes": concat}, "f:1")
