"""``unimoe detect`` on moving pictures."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimoe.commands import main as cli
from unimoe.detection.inference.sources import frames
from unimoe.errors import UserError


@pytest.fixture
def film(tmp_path) -> Path:
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


def test_every_frame_or_so_many_a_second(film):
    found = dict(frames(film))
    assert [name.rsplit(":", 1)[1] for name in found] == [f"{number:06d}" for number in range(12)]
    brightness = [np.asarray(picture).mean() for picture in found.values()]
    assert brightness == pytest.approx([20 * number for number in range(12)], abs=6)
    assert [name[-2:] for name, _ in frames(film, rate=2)] == ["00", "03", "06", "09"]
    assert next(iter(found.values())).size == (96, 64)


def test_a_film_is_searched_frame_by_frame(folder, film, tmp_path, capsys):
    args = ["detect", str(folder), str(film), "--prompt", "cat, tree", "--threshold", "0", "--rate", "1"]
    assert cli.main([*args, "--json", "--draw", str(tmp_path / "drawn")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [one["image"][-15:] for one in answer["images"]] == ["film.mp4:000000", "film.mp4:000006"]
    assert all(len(one["detections"]) == 24 for one in answer["images"])
    assert len(list((tmp_path / "drawn").iterdir())) == 2
    assert cli.main([*args[:-1], "0"]) == 2
    assert "--rate is 0.0, expected a positive number" in capsys.readouterr().err


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"films need PyAV: pip install 'unimoe\[video\]'"):
        list(frames(tmp_path / "film.mp4"))
