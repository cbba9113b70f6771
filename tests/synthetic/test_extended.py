"""The data sets that the extended demo adds."""

import json

import pytest
import soundfile

from unimoe.data import load_video, read_samples
from unimoe.synthetic.extended import add_extended
from unimoe.synthetic.scenes import FRAMES
from unimoe.synthetic.writer import Writer


def test_files_of_the_extended_demo(artist, photo, tmp_path):
    pytest.importorskip("av")
    writer = Writer(tmp_path)
    add_extended(writer, 0, artist, {"train": [photo], "test": [photo]}, 8, 24, 12, 1.06)
    writer.close()
    counts = {file: len(lines) for file, lines in writer.lines.items()}
    assert counts["train.videos"] == 8 and counts["test.videos"] == 48 and counts["train.sounds"] == 24
    assert counts["test.sounds"] == counts["test.sounds_asked"] == counts["test.speech"] == 12
    for file, kind in (
        ("test.videos", "video"),
        ("test.sounds", "audio"),
        ("test.sounds_asked", "speech+audio"),
    ):
        samples = read_samples(tmp_path / f"{file}.jsonl")
        assert {sample.modality for sample in samples} == {kind}
    assert {sample.modality for sample in read_samples(tmp_path / "train.sounds.jsonl")} == {
        "audio",
        "speech+audio",
    }
    facts = [json.loads(line) for line in writer.lines["test.videos"]]
    assert {fact["kind"] for fact in facts} == {"first", "last", "moves", "name"}
    video = next(iter(read_samples(tmp_path / "test.videos.jsonl")[0].media()))
    assert len(load_video(video, "f", frames=99)) == FRAMES
    heard = next(iter(read_samples(tmp_path / "test.sounds.jsonl")[0].media()))
    assert soundfile.info(heard["path"]).samplerate == 16_000
