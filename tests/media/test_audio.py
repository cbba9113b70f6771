import base64
import builtins
import io

import numpy as np
import pytest
import soundfile

from unimoe.errors import UserError
from unimoe.media.audio import check_audio, load_audio


def audio(content, **options):
    return load_audio({"type": "speech", "bytes": content}, "f:1", **options)


def recorded(samples, rate, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def tone(rate, seconds=0.5, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def fault(load, part):
    with pytest.raises(UserError) as caught:
        load({"type": "speech", **part}, "data.jsonl:4")
    message = str(caught.value)
    assert message.startswith("data.jsonl:4: ") and "\n" not in message
    return message


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44101, 48000, 192_000])
def test_any_rate_becomes_16_khz(rate):
    loaded = audio(recorded(tone(rate), rate, format="WAV"))
    assert loaded.dtype == np.float32 and abs(len(loaded) - 8000) <= 1
    middle = slice(1000, 7000)  # away from the filter's edges
    assert np.abs(loaded[middle] - tone(16000)[middle]).max() < 2e-3


def test_channels_are_averaged():
    stereo = np.stack([tone(44100), -0.5 * tone(44100)], axis=1)
    loaded = audio(recorded(stereo, 44100, format="WAV"))
    assert np.abs(loaded - 0.25 * tone(16000))[1000:7000].max() < 2e-3


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [("WAV", "PCM_U8", 1e-2), ("WAV", "PCM_24", 1e-6), ("WAV", "FLOAT", 1e-6), ("FLAC", "PCM_16", 1e-4)],
)
def test_formats(format, subtype, tolerance):
    loaded = audio(recorded(tone(16000), 16000, format=format, subtype=subtype))
    assert np.abs(loaded - tone(16000)).max() < tolerance


def test_audio_from_path_data_url_and_memory(tmp_path):
    content = recorded(tone(16000), 16000, format="FLAC")
    (tmp_path / "a.flac").write_bytes(content)
    url = f"data:audio/flac;base64,{base64.b64encode(content).decode()}"
    integers = (tone(8000) * 32767).astype(np.int16)
    parts = [{"path": str(tmp_path / "a.flac")}, {"url": url}, {"speech": tone(16000)}]
    bytes_ = (tone(16000) * 127 + 128).astype(np.uint8)
    coarse = load_audio({"type": "speech", "speech": bytes_}, "f:1")
    assert np.abs(coarse - tone(16000)).max() < 2 / 127
    for part in [*parts, {"speech": integers, "sampling_rate": 8000}]:
        loaded = load_audio({"type": "speech", **part}, "f:1")
        assert np.abs(loaded - tone(16000))[1000:7000].max() < 2e-3


def test_a_length_that_is_a_lie_costs_no_memory():
    content = bytearray(recorded(tone(16000), 16000, format="FLAC"))
    content[21:26] = bytes([content[21] | 0x0F, 255, 255, 255, 255])  # 2**36 - 1 samples
    assert "cannot decode the audio" in fault(load_audio, {"bytes": bytes(content)})


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_one_sample_is_audio(rate):
    assert audio(recorded(np.array([0.5]), rate, format="WAV")).size >= 1


def test_impossible_rates():
    for rate in (0, -16000, 3, 10**9):
        message = fault(load_audio, {"speech": tone(16000), "sampling_rate": rate})
        assert f"has {rate} samples a second, expected 100 to 1,000,000" in message
    assert "has the shape [2, 2, 2]" in fault(load_audio, {"speech": np.zeros((2, 2, 2))})
    assert "has the shape [2, 16000]" in fault(load_audio, {"speech": np.zeros((2, 16000))})


def test_four_hours_are_cut_and_it_is_said(tmp_path, caplog, monkeypatch):
    path, seconds = tmp_path / "long.flac", 4 * 3600
    with soundfile.SoundFile(path, "w", 8000, 1) as file:
        for _ in range(seconds // 600):
            file.write(np.zeros(600 * 8000, np.int16))
    read = []
    whole = soundfile.SoundFile.read

    def count(self, frames, **options):
        read.append(frames)
        return whole(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", count)
    loaded = load_audio({"type": "audio", "path": str(path)}, "f:7", longest=600)
    assert len(loaded) == 600 * 16000 and sum(read) < 601 * 8000 + 2 * 2**16
    assert f"f:7: the audio {path} lasts 14400 s; what follows after 600 s is dropped" in caplog.text
    caplog.clear()
    read.clear()
    check_audio({"type": "audio", "path": str(path)}, "f:7")  # all of it, in blocks
    assert len(read) == -(-seconds * 8000 // 2**16) + 1 and not caplog.text
    array = {"type": "audio", "audio": tone(16000, 2.0)}
    assert len(load_audio(array, "f:8", longest=1.0)) == 16000 and "f:8" in caplog.text
    caplog.clear()
    assert len(load_audio(array, "f:8", longest=2.0)) == 32000 and not caplog.text


def test_broken_audio(tmp_path):
    path = tmp_path / "a.wav"
    part = {"path": str(path)}
    path.write_bytes(b"")
    assert fault(load_audio, part) == f"data.jsonl:4: the speech {path} is empty (0 bytes)"
    path.write_bytes(recorded(np.zeros(0), 16000, format="WAV"))
    assert f"the audio {path} holds no samples" in fault(load_audio, part)
    path.write_bytes(b"RIFF" + b"\1" * 60)
    assert "cannot decode the audio" in fault(load_audio, part)
    path.write_bytes(recorded(np.array([0.0, np.nan]), 16000, format="WAV", subtype="FLOAT"))
    assert "not finite" in fault(load_audio, part)
    late = np.zeros(3 * 2**16)  # whole blocks: behind the last comes none
    path.write_bytes(recorded(late, 16000, format="WAV", subtype="FLOAT"))
    check_audio({"type": "speech", **part}, "f:1")
    late[-1] = np.inf
    path.write_bytes(recorded(late, 16000, format="WAV", subtype="FLOAT"))
    assert "not finite" in fault(check_audio, part) and "not finite" in fault(load_audio, part)
    assert "cannot read" in fault(load_audio, {"path": str(tmp_path / "gone.wav")})


def contained(name, codec, rate, seconds=0.5):
    """A tone in a container, encoded by PyAV."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=name) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout, stream.bit_rate = "mono", 64_000
        samples = tone(rate, seconds).astype(np.float32)
        for start in range(0, len(samples), 960):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 960], "fltp", "mono")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


CONTAINERS = [
    ("mp4", "aac", 16000),
    ("webm", "libopus", 48000),
    ("adts", "aac", 44100),
    ("matroska", "flac", 16000),
    ("mpegts", "aac", 48000),
    ("asf", "wmav2", 44100),
    ("3gp", "aac", 16000),
    ("flv", "aac", 44100),
]


@pytest.mark.parametrize(("name", "codec", "rate"), CONTAINERS)
def test_recordings_of_phones_and_browsers(name, codec, rate, tmp_path):
    content = contained(name, codec, rate)
    path = tmp_path / "recording.wav"  # the ending does not matter
    path.write_bytes(content)
    part = {"type": "speech", "path": str(path)}
    loaded = load_audio(part, "f:1")
    assert loaded.dtype == np.float32 and 7200 < len(loaded) < 10500  # encoders pad
    spectrum = np.abs(np.fft.rfft(loaded))
    assert abs(spectrum.argmax() * 16000 / len(loaded) - 440) < 5
    assert 0.2 < np.abs(loaded).max() < 0.8
    check_audio(part, "f:1")


def test_the_rest_of_a_long_recording_is_not_decoded(caplog):
    content = contained("mp4", "aac", 16000, seconds=4)
    loaded = load_audio({"type": "speech", "bytes": content}, "f:1", longest=1.0)
    assert len(loaded) == 16000 and "lasts 4 s; what follows after 1 s is dropped" in caplog.text


def test_a_container_without_audio_or_without_pyav(monkeypatch, tmp_path):
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode())
    assert "it holds no audio, only video" in fault(load_audio, {"bytes": buffer.getvalue()})
    content = contained("mp4", "aac", 16000)
    assert "cannot decode the audio" in fault(load_audio, {"bytes": content[: len(content) // 2]})
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "av":
            raise ImportError(name="av")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    message = fault(load_audio, {"bytes": content})
    assert "expected wav, flac, ogg or mp3; m4a, webm, aac and others need PyAV: pip install" in message
