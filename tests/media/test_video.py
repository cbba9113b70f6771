import io
import re
import struct
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.data import load_video
from unimoe.errors import UserError
from unimoe.media.video import spread, write_video

av = pytest.importorskip("av")


def encode(frames, format="mp4", codec="mpeg4", rate=10, gop=12, b_frames=None, **options):
    """A video whose n-th frame is ``frames[n]`` grey."""
    with tempfile.TemporaryDirectory() as folder:  # faststart needs a file
        file = Path(folder) / "video"
        with av.open(str(file), "w", format=format, options=options) as container:
            stream = container.add_stream(codec, rate=rate)
            stream.width, stream.height, stream.gop_size = 64, 48, gop
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if b_frames is not None:
                stream.codec_context.max_b_frames = b_frames
            for grey in frames:
                picture = Image.new("RGB", (64, 48), (grey, grey, grey))
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
        return file.read_bytes()


GREYS = list(range(0, 250, 5))
"""50 frames, 5 s, growing brighter."""


def greys(pictures):
    return [round(float(np.asarray(picture)[24, 32].mean())) for picture in pictures]


def video(content, where="f:1", **options):
    return load_video({"type": "video", "bytes": content}, where, **options)


def fault(part, **options):
    with pytest.raises(UserError) as caught:
        load_video({"type": "video", **part}, "data.jsonl:4", **options)
    message = str(caught.value)
    assert message.startswith("data.jsonl:4: ") and "\n" not in message
    return message


def trimmed(content, frames):
    """Without its first frames, by an edit list: those since the last key frame stay in the file, unseen."""
    with tempfile.TemporaryDirectory() as folder, av.open(io.BytesIO(content)) as whole:
        file, source = Path(folder) / "video.mp4", whole.streams.video[0]
        with av.open(str(file), "w", options={"avoid_negative_ts": "disabled"}) as container:
            stream = container.add_stream_from_template(source)
            for packet in whole.demux(source):
                if packet.dts is not None:
                    packet.pts -= frames * packet.duration
                    packet.dts -= frames * packet.duration
                    packet.stream = stream
                    container.mux(packet)
        return file.read_bytes()


def test_a_trimmed_video_is_whole():
    pictures = video(trimmed(encode(GREYS, codec="libx264", gop=25, b_frames=0), 30), frames=3)
    assert greys(pictures) == pytest.approx([GREYS[30], GREYS[40], GREYS[49]], abs=4)


@pytest.mark.parametrize("format", ["mp4", "matroska"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_slides_that_are_shown_for_seconds_are_whole(format, count):
    pictures = video(encode(GREYS[:count], format, rate=Fraction(1, 5)), frames=8)
    assert [picture.info["seconds"] for picture in pictures] == [5 * index for index in range(count)]


def test_an_animation_that_rests_on_its_last_picture_is_whole():
    pictures = [Image.new("L", (8, 8), grey) for grey in (0, 50, 100, 150, 200)]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=[100] * 4 + [5000])
    assert len(video(file.getvalue(), frames=8)) == 5


@pytest.mark.parametrize(
    ("format", "codec", "gop"),
    [("mp4", "mpeg4", 12), ("mp4", "libx264", 50), ("matroska", "libvpx-vp9", 5), ("avi", "mjpeg", 1)],
)
def test_frames_by_count_are_spread_from_first_to_last(format, codec, gop):
    pictures = video(encode(GREYS, format, codec, gop=gop), frames=8)
    wanted = [GREYS[index] for index in (0, 7, 14, 21, 28, 35, 42, 49)]
    assert np.abs(np.array(greys(pictures)) - wanted).max() <= 4
    assert pictures[0].size == (64, 48) and pictures[0].mode == "RGB"


@pytest.mark.parametrize(
    ("format", "codec", "gop"),
    [
        ("mpegts", "libx264", 25),
        ("mpegts", "libx264", 10),
        ("mpegts", "mpeg2video", 12),
        ("mpegts", "mpeg4", 12),
        ("mpeg", "mpeg2video", 12),
        ("mpeg", "mpeg2video", 200),
        ("avi", "libx264", 25),
        ("avi", "mpeg4", 12),
        ("flv", "libx264", 25),
        ("mp4", "libx264", 3),
    ],
)
def test_with_b_frames_they_are_those_of_the_whole_video_decoded(format, codec, gop):
    content = encode(range(0, 250, 2), format, codec, rate=25, gop=gop, b_frames=2)
    with av.open(io.BytesIO(content)) as container:
        whole = [np.asarray(frame.to_image()) for frame in container.decode(video=0)]
    assert len(whole) == 125
    for count in (4, 7, 16, 200):
        indices = spread(range(125), count)
        pictures = video(content, frames=count)
        seconds = [picture.info["seconds"] for picture in pictures]
        assert seconds == pytest.approx([index / 25 for index in indices], abs=1e-3)
        for picture, index in zip(pictures, indices, strict=True):
            assert np.array_equal(picture, whole[index])


def test_frames_by_rate():
    content = encode(GREYS)
    found = greys(video(content, frames=32, rate=2))  # 10 frames a second: every fifth
    assert np.abs(np.array(found) - GREYS[::5]).max() <= 4
    assert len(video(content, frames=4, rate=2)) == 4  # the cap
    assert len(video(content, frames=99, rate=1000)) == 50  # there are no more


def test_a_short_video_gives_what_it_has():
    assert np.abs(np.array(greys(video(encode([10, 200]), frames=8))) - [10, 200]).max() <= 4
    assert len(video(encode([99]), frames=8, rate=1.0)) == 1


def test_lists_of_frames_keep_their_order(tmp_path):
    paths = []
    for index, grey in enumerate((9, 200, 50, 120, 70)):
        paths.append(str(tmp_path / f"{9 - index}.png"))
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(paths[-1])
    part = {"type": "video", "path": paths}
    assert [picture.getpixel((0, 0))[0] for picture in load_video(part, "f:1", 3)] == [9, 50, 70]
    memory = {"type": "video", "video": [Image.open(path) for path in paths]}
    assert len(load_video(memory, "f:1", 8)) == 5


def test_an_animation_is_a_video():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (grey, grey, grey)) for grey in (0, 80, 160, 240)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    found = [round(float(np.asarray(picture).mean())) for picture in video(buffer.getvalue(), frames=4)]
    assert np.abs(np.array(found) - [0, 80, 160, 240]).max() <= 6


def test_frames_are_scaled_down():
    assert video(encode(GREYS[:3]), frames=1, longest=16)[0].size == (16, 12)


def test_a_video_from_a_turned_camera_is_upright():
    left = Image.new("RGB", (64, 48))
    left.paste((255, 255, 255), (0, 0, 32, 48))
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        write_video(file.name, [left] * 3, rate=5)
        content = bytearray(Path(file.name).read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (upright,) = video(bytes(content), frames=1)
    assert upright.size == (48, 64)  # a quarter turn clockwise: what was left is above
    assert upright.getpixel((24, 10))[0] > 200 and upright.getpixel((24, 54))[0] < 50


def test_the_nearest_frames_are_taken_when_time_is_uneven():
    assert spread([0.0, 0.1, 0.2, 5.0], 3) == [0, 2, 3]
    assert spread([0.0, 0.9, 1.1, 2.0], 8, rate=1.0) == [0, 1, 3]


@pytest.mark.parametrize(
    ("format", "options"), [("mp4", {"movflags": "faststart"}), ("matroska", {}), ("avi", {}), ("mp4", {})]
)
def test_a_truncated_video_is_an_error(format, options, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, 100).tolist()
    whole = encode(noise, format, rate=10, **options)
    path = tmp_path / f"half.{format}"
    path.write_bytes(whole[: len(whole) // 2])
    message = fault({"path": str(path)}, frames=4)
    assert str(path) in message and re.search("is truncated|cannot decode", message)
    assert message.count("data.jsonl:4") == 1


def test_a_video_without_frames(tmp_path):
    assert "holds no frames" in fault({"video": []})
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "holds no frames; it holds audio" in fault({"path": str(path)})
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(160), 16000, format="WAV")
    assert "holds no frames" in fault({"bytes": buffer.getvalue()})


def test_what_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"not a video at all" * 50)
    assert "cannot decode the video" in fault({"path": str(path)})
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in fault({"path": str(path)})
    assert "cannot read" in fault({"path": str(tmp_path / "gone.mp4")})


def test_a_playlist_opens_no_other_file(tmp_path):
    (tmp_path / "real.mp4").write_bytes(encode(GREYS[:5]))
    real = tmp_path / "real.mp4"
    for text in (f"ffconcat version 1.0\nfile {real}\n", f"#EXTM3U\n#EXTINF:1,\n{real}\n"):
        assert "cannot decode the video" in fault({"bytes": text.encode()})
