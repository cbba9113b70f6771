import json

import numpy as np
import soundfile
from PIL import Image

from unimoe.data.read import read_samples
from unimoe.synthetic.clips import Clip
from unimoe.synthetic.writer import Writer, media_part, text_part


def test_what_is_written_can_be_read(tmp_path):
    writer = Writer(tmp_path)
    image = writer.image(Image.new("RGB", (16, 16), (200, 0, 0)), "train")
    audio = writer.audio(np.zeros(1600, np.float32), "train")
    parts = [media_part("image", image), media_part("audio", audio), text_part("What?")]
    writer.add("train.image", [(parts, "Red.")], kind="colour")
    writer.close()
    assert (image, audio) == ("media/train/00000.jpg", "media/train/00001.flac")
    (sample,) = read_samples(tmp_path / "train.image.jsonl")
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "audio", "text"]
    record = json.loads((tmp_path / "train.image.jsonl").read_text())
    assert record["id"] == "train.image-0" and record["kind"] == "colour"


def test_a_clip_is_written_once_for_each_speed(tmp_path):
    writer = Writer(tmp_path)
    clip = Clip("slt", "What is this?", np.linspace(-0.5, 0.5, 1600, dtype=np.float32), (400, 800, 1600))
    paths = [writer.clip(clip, speed) for speed in (1.0, 1.0, 2.0)]
    assert paths == ["media/speech/slt-what-is-this-100.flac"] * 2 + [
        "media/speech/slt-what-is-this-200.flac"
    ]
    assert [soundfile.info(tmp_path / path).frames for path in paths[1:]] == [1600, 800]
