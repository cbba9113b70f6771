"""What the extended demo adds: sounds that can be told apart, films that are what their answers say."""

import json
import random

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.data import load_video, read_samples
from unimoe.synthetic.concepts import HELD_OUT, TRAINED
from unimoe.synthetic.extended import DIRECTIONS, add_extended
from unimoe.synthetic.scenes import FRAMES, moving, one_after_another
from unimoe.synthetic.sounds import ANSWERS, sound
from unimoe.synthetic.sprites import open_artist
from unimoe.synthetic.writer import Writer


@pytest.fixture(scope="module")
def artist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sprites")
    for concept in TRAINED + HELD_OUT:
        Image.new("RGBA", (72, 40), (255, 0, 0, 255)).save(folder / f"{ord(concept.char):x}.png")
    return open_artist(folder)


GROUND = Image.new("RGB", (200, 180), (0, 90, 0))


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_sound_is_a_function_of_its_seed(kind):
    one, same, other = (sound(kind, random.Random(seed)) for seed in (1, 1, 2))
    assert one.dtype == np.float32 and 16_000 <= len(one) <= 32_000
    assert np.isfinite(one).all() and 0.1 < np.abs(one).max() <= 0.9
    assert np.array_equal(one, same) and not np.array_equal(one[:16_000], other[:16_000])


def test_kinds_of_sound_can_be_told_apart():
    """By the nearest mean spectrum and rhythm, far above the 1/12 of guessing."""

    def describe(kind, seed):
        samples = sound(kind, random.Random(seed))[:16_000].astype(float)
        power = np.abs(np.fft.rfft(samples))[: 16 * 480].reshape(-1, 160).sum(1)
        loud = np.abs(samples).reshape(50, -1).mean(1)
        rhythm = np.abs(np.fft.rfft(loud - loud.mean()))[1:]
        return np.concatenate([np.log(power + 1e-6), 2 * np.log(rhythm + 1e-3)])

    means = {kind: np.mean([describe(kind, seed) for seed in range(12)], 0) for kind in ANSWERS}
    right = 0
    for kind in ANSWERS:
        for seed in range(100, 105):
            found = describe(kind, seed)
            right += min(means, key=lambda name: np.abs(means[name] - found).sum()) == kind
    assert right / (5 * len(ANSWERS)) > 0.5


def redness(frame):
    """Centre of what is red."""
    pixels = np.asarray(frame).astype(int)
    y, x = np.nonzero(pixels[..., 0] > pixels[..., 1] + 60)
    return x.mean(), y.mean()


@pytest.mark.parametrize("way", DIRECTIONS)
def test_things_move_where_the_answer_says(artist, way):
    frames = moving(TRAINED[0], way, artist, GROUND, random.Random(3))
    assert len(frames) == FRAMES
    (x0, y0), (x1, y1) = redness(frames[0]), redness(frames[-1])
    moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
    assert max(moved, key=lambda name: moved[name]) == way


def test_one_thing_after_another(artist):
    frames = one_after_another(TRAINED[0], TRAINED[1], artist, GROUND, random.Random(5))
    steps = [
        np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean()
        for a, b in zip(frames, frames[1:], strict=False)
    ]
    change = int(np.argmax(steps))
    assert len(frames) == FRAMES and 2 <= change <= FRAMES - 4 and steps[change] > 2 * sorted(steps)[-2]


def test_files_of_the_extended_demo(artist, tmp_path):
    pytest.importorskip("av")
    writer = Writer(tmp_path)
    add_extended(writer, 0, artist, {"train": [GROUND], "test": [GROUND]}, 8, 24, 12, 1.06)
    writer.close()
    counts = {file: len(lines) for file, lines in writer.lines.items()}
    assert counts["train.films"] == 8 and counts["test.films"] == 48 and counts["train.sounds"] == 24
    assert counts["test.sounds"] == counts["test.sounds_asked"] == counts["test.speech"] == 12
    for file, kind in (
        ("test.films", "video"),
        ("test.sounds", "audio"),
        ("test.sounds_asked", "speech+audio"),
    ):
        samples = read_samples(tmp_path / f"{file}.jsonl")
        assert {sample.modality for sample in samples} == {kind}
    assert {sample.modality for sample in read_samples(tmp_path / "train.sounds.jsonl")} == {
        "audio",
        "speech+audio",
    }
    facts = [json.loads(line) for line in writer.lines["test.films"]]
    assert {fact["kind"] for fact in facts} == {"first", "last", "moves", "name"}
    film = next(iter(read_samples(tmp_path / "test.films.jsonl")[0].media()))
    assert len(load_video(film, "f", frames=99)) == FRAMES
    heard = next(iter(read_samples(tmp_path / "test.sounds.jsonl")[0].media()))
    assert soundfile.info(heard["path"]).samplerate == 16_000
