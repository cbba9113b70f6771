"""Names of a prompt or a file, and the images and videos that a user names."""

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unimoe.commands import main as cli
from unimoe.detection.inference.sources import (
    OutputNames,
    find_inputs,
    iter_images,
    read_names,
    split_prompt,
    video_frames,
)
from unimoe.errors import UserError


@pytest.fixture
def video(tmp_path) -> Path:
    """Twelve frames, six a second, ever brighter."""
    av: Any = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=6)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(12):
            grey = np.full((64, 96, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_every_frame_or_so_many_a_second(video):
    found = dict(video_frames(video))
    assert [name.rsplit(":", 1)[1] for name in found] == [f"{number:06d}" for number in range(12)]
    brightness = [np.asarray(picture).mean() for picture in found.values()]
    assert brightness == pytest.approx([20 * number for number in range(12)], abs=6)
    assert [name[-2:] for name, _ in video_frames(video, rate=2)] == ["00", "03", "06", "09"]
    assert next(iter(found.values())).size == (96, 64)


def test_a_video_is_searched_frame_by_frame(folder, video, tmp_path, capsys):
    args = ["detect", str(folder), str(video), "--prompt", "cat, tree", "--threshold", "0", "--rate", "1"]
    assert cli.main([*args, "--json", "--draw", str(tmp_path / "drawn")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["image"][-15:] for one in answer["images"]] == ["film.mp4:000000", "film.mp4:000006"]
    assert all(len(one["detections"]) == 24 for one in answer["images"])
    assert len(list((tmp_path / "drawn").iterdir())) == 2
    assert cli.main([*args[:-1], "0"]) == 2
    assert "--rate is 0.0, expected a positive number" in capsys.readouterr().err


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"a video needs PyAV: pip install 'unimoe\[video\]'"):
        list(video_frames(tmp_path / "film.mp4"))


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("cat, red car", ["cat", "red car"]),
        ("a cat. a remote control.", ["a cat", "a remote control"]),
        ("cat . dog .", ["cat", "dog"]),
        ("cat.", ["cat"]),
        ("cat, Cat, dog.", ["cat", "dog"]),
        ('"salt, pepper", cat', ["salt, pepper", "cat"]),
        ('"salt, pepper"', ["salt, pepper"]),
        ("3.5 inch disk", ["3.5 inch disk"]),
        ("cat, \u200b", ["cat"]),
    ],
)
def test_names_of_a_prompt(prompt, names):
    assert split_prompt(prompt) == names


@pytest.mark.parametrize("prompt", ["", " , ", ".", "\u200b", "()"])
def test_a_prompt_without_names(prompt):
    with pytest.raises(UserError, match="expected names to look for"):
        split_prompt(prompt)


def test_names_of_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffcat\n\nsalt, pepper\ncat\n", encoding="utf-8")
    assert read_names(path) == (["cat", "salt, pepper"], {})
    path = tmp_path / "names.json"
    for content in (
        ["cat", "dog"],
        {"cat": None, "dog": None},
        {"categories": [{"name": "cat"}, {"name": "dog"}]},
    ):
        path.write_text(json.dumps(content))
        assert read_names(path) == (["cat", "dog"], {})
    path.write_text('{"cat": 0.5, "dog": null}')
    assert read_names(path) == (["cat", "dog"], {"cat": 0.5})
    for content in ("3", "[1]", "{", '{"categories": [3]}', "[]"):
        path.write_text(content)
        with pytest.raises(UserError, match="names.json"):
            read_names(path)


def test_files_are_told_by_their_content(tmp_path, video):
    place = tmp_path / "in"
    place.mkdir()
    for name, format in (("a.avif", "AVIF"), ("b.jp2", "JPEG2000"), ("c.ppm", "PPM"), ("d.data", "PNG")):
        Image.new("RGB", (20, 10)).save(place / name, format)
    (place / "e.jpg").write_bytes(b"no image")
    (place / "f.txt").write_text("notes")
    video.rename(place / "g.bin")
    found = find_inputs([str(place)])
    assert [file.name for file in found] == ["a.avif", "b.jp2", "c.ppm", "d.data", "e.jpg", "g.bin"]
    answers = dict(iter_images(found))
    assert sum(isinstance(image, UserError) for image in answers.values()) == 1 and len(answers) == 5 + 12
    with pytest.raises(UserError, match="no image is there"):
        find_inputs([str(place / "*.txt")])


def write_video(path: Path, times: list[float]) -> Path:
    """A Matroska file with frames at the given seconds."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(10 * time), Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("start", [0, 30, 3600])
def test_the_clock_begins_with_the_first_frame(tmp_path, start):
    video = write_video(tmp_path / "a.mkv", [start + number / 10 for number in range(40)])
    assert [name[-2:] for name, _ in video_frames(video, rate=1)] == ["00", "10", "20", "30"]


def test_nothing_is_made_up_for_a_pause(tmp_path):
    times = [number / 10 for number in range(20)] + [60 + number / 10 for number in range(20)]
    video = write_video(tmp_path / "a.mkv", times)
    assert [name[-2:] for name, _ in video_frames(video, rate=1)] == ["00", "10", "20", "30"]


def test_a_video_of_sound_alone_is_named_so(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="holds no images; it holds audio"):
        list(video_frames(path))


def test_a_video_that_is_cut_off_keeps_what_came_before(tmp_path):
    whole = write_video(tmp_path / "whole.mkv", [number / 10 for number in range(40)])
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    answers = list(iter_images([cut]))
    assert 1 <= sum(not isinstance(image, UserError) for _, image in answers) < 40


def test_no_two_outputs_share_a_name():
    names = OutputNames()
    found = [names(name) for name in ("x.png", "../x.png", ".x.png", "a/b.png", "a_b.png", "A_B.png")]
    assert found == ["x.png", "x.png-2", "x.png-3", "a_b.png", "a_b.png-2", "A_B.png-3"]
