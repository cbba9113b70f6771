import base64
import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.data import load_audio, load_image
from unimoe.errors import UserError
from unimoe.media.decode import check_audio


def encoded(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def image(content):
    return load_image({"type": "image", "bytes": content}, "f:1")


def sound(content, **options):
    return load_audio({"type": "speech", "bytes": content}, "f:1", **options)


def recorded(samples, rate, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def tone(rate, seconds=0.5, frequency=440.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)


def fault(load, part):
    with pytest.raises(UserError) as caught:
        load({"type": "image" if load is load_image else "speech", **part}, "data.jsonl:4")
    message = str(caught.value)
    assert message.startswith("data.jsonl:4: ") and "\n" not in message
    return message


def test_rotated_by_exif():
    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the right
    loaded = image(encoded(picture, exif=exif))
    assert loaded.size == (2, 4)
    assert loaded.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).resize((8, 4), Image.Resampling.NEAREST)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey.convert("RGB").convert(mode)
    loaded = image(encoded(picture, "TIFF" if mode == "CMYK" else "PNG"))
    assert loaded.mode == "RGB" and loaded.size == (8, 4)
    assert loaded.getpixel((0, 0)) == (0, 0, 0) and loaded.getpixel((7, 3)) == (255, 255, 255)


def test_sixteen_bit_colour_and_floating_point():
    grey = np.array([[0, 65535]], dtype=np.uint16)
    assert [image(encoded(Image.fromarray(grey), "TIFF")).getpixel((x, 0))[0] for x in (0, 1)] == [0, 255]
    floating = Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))
    assert [image(encoded(floating, "TIFF")).getpixel((x, 0))[0] for x in (0, 1)] == [0, 255]


def test_of_an_animation_the_first_frame_is_taken_and_it_is_said(caplog):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image(content).getpixel((0, 0)) == (255, 0, 0)
    assert "f:1: the image given as bytes is an animation; its first frame is taken" in caplog.text
    caplog.clear()
    image(encoded(frames[0], "GIF"))
    assert not caplog.text


def test_of_pages_and_of_a_phones_pictures_the_first_is_taken(caplog):
    def pages(format):
        first, *others = (Image.new("RGB", (8, 8), color) for color in ("red", "blue", "blue"))
        return image(encoded(first, format, save_all=True, append_images=others))

    assert pages("MPO").getpixel((0, 0))[0] > 240 and not caplog.text
    assert pages("TIFF").getpixel((0, 0)) == (255, 0, 0)
    assert "f:1: the image given as bytes holds 3 pages; its first is taken" in caplog.text


@pytest.mark.parametrize(
    ("format", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "P"), ("JPEG", "CMYK")]
)
def test_a_huge_picture_is_scaled_down_while_it_is_read(format, mode):
    wide = Image.new("RGB", (30_000, 200), (200, 30, 30)).convert(mode)
    loaded = load_image({"type": "image", "bytes": encoded(wide, format)}, "f:1", longest=1024)
    assert loaded.size == (1024, 7)
    assert np.abs(np.array(loaded.getpixel((500, 3))) - (200, 30, 30)).max() < 40
    small = load_image({"type": "image", "image": Image.new("RGB", (30, 20))}, "f:1", longest=1024)
    assert small.size == (30, 20)


def test_more_pixels_than_are_safe_are_refused():
    content = encoded(Image.new("1", (30_000, 30_000)))  # 113 kB
    assert "exceeds limit" in fault(load_image, {"bytes": content})


def test_transparency_is_laid_on_white():
    assert image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))).getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 1), 1)
    loaded = image(encoded(palette, transparency=0))
    assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((1, 1)) == (200, 0, 0)


def test_image_from_path_data_url_and_memory(tmp_path):
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    content = encoded(picture)
    (tmp_path / "a.png").write_bytes(content)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for part in ({"path": str(tmp_path / "a.png")}, {"url": url}, {"image": picture}):
        assert load_image({"type": "image", **part}, "f:1").getpixel((2, 1)) == (1, 2, 3)


def test_broken_images(tmp_path):
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    path = tmp_path / "a.png"
    for broken in (content[: len(content) // 2], content[:20], content[:30] + b"\0" * 50, b"<svg></svg>"):
        path.write_bytes(broken)
        assert f"cannot decode the image {path}" in fault(load_image, {"path": str(path)})
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in fault(load_image, {"path": str(path)})
    assert "cannot read" in fault(load_image, {"path": str(tmp_path / "gone.png")})
    assert "cannot read" in fault(load_image, {"path": str(tmp_path)})
    assert "not valid base64" in fault(load_image, {"url": "data:image/png;base64,???"})
    assert "not a data URL" in fault(load_image, {"url": "https://example.org/a.png"})
    assert "has no medium" in fault(load_image, {})


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44101, 48000, 192_000])
def test_any_rate_becomes_16_khz(rate):
    loaded = sound(recorded(tone(rate), rate, format="WAV"))
    assert loaded.dtype == np.float32 and abs(len(loaded) - 8000) <= 1
    middle = slice(1000, 7000)  # away from the filter's edges
    assert np.abs(loaded[middle] - tone(16000)[middle]).max() < 2e-3


def test_channels_are_averaged():
    stereo = np.stack([tone(44100), -0.5 * tone(44100)], axis=1)
    loaded = sound(recorded(stereo, 44100, format="WAV"))
    assert np.abs(loaded - 0.25 * tone(16000))[1000:7000].max() < 2e-3


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [("WAV", "PCM_U8", 1e-2), ("WAV", "PCM_24", 1e-6), ("WAV", "FLOAT", 1e-6), ("FLAC", "PCM_16", 1e-4)],
)
def test_formats(format, subtype, tolerance):
    loaded = sound(recorded(tone(16000), 16000, format=format, subtype=subtype))
    assert np.abs(loaded - tone(16000)).max() < tolerance


def test_sound_from_path_data_url_and_memory(tmp_path):
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
    assert "cannot decode the sound" in fault(load_audio, {"bytes": bytes(content)})


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_one_sample_is_a_sound(rate):
    assert sound(recorded(np.array([0.5]), rate, format="WAV")).size >= 1


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
    assert f"f:7: the sound {path} lasts 14400 s; what comes after 600 s is left out" in caplog.text
    caplog.clear()
    read.clear()
    check_audio({"type": "audio", "path": str(path)}, "f:7")  # all of it, in blocks
    assert len(read) == -(-seconds * 8000 // 2**16) + 1 and not caplog.text
    array = {"type": "audio", "audio": tone(16000, 2.0)}
    assert len(load_audio(array, "f:8", longest=1.0)) == 16000 and "f:8" in caplog.text
    caplog.clear()
    assert len(load_audio(array, "f:8", longest=2.0)) == 32000 and not caplog.text


def test_broken_sounds(tmp_path):
    path = tmp_path / "a.wav"
    part = {"path": str(path)}
    path.write_bytes(b"")
    assert fault(load_audio, part) == f"data.jsonl:4: the speech {path} is empty (0 bytes)"
    path.write_bytes(recorded(np.zeros(0), 16000, format="WAV"))
    assert f"the sound {path} holds no samples" in fault(load_audio, part)
    path.write_bytes(b"RIFF" + b"\1" * 60)
    assert "cannot decode the sound" in fault(load_audio, part)
    path.write_bytes(recorded(np.array([0.0, np.nan]), 16000, format="WAV", subtype="FLOAT"))
    assert "not finite" in fault(load_audio, part)
    late = np.zeros(3 * 2**16)  # whole blocks: behind the last comes none
    path.write_bytes(recorded(late, 16000, format="WAV", subtype="FLOAT"))
    check_audio({"type": "speech", **part}, "f:1")
    late[-1] = np.inf
    path.write_bytes(recorded(late, 16000, format="WAV", subtype="FLOAT"))
    assert "not finite" in fault(check_audio, part) and "not finite" in fault(load_audio, part)
    assert "cannot read" in fault(load_audio, {"path": str(tmp_path / "gone.wav")})
