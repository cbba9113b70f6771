"""Additional data of the extended demo: short videos, environmental sounds, speech transcription.

videos   what comes first or last, direction of movement, name; three of the four need temporal order
sounds   twelve synthetic classes; half of the training questions are spoken, so that a sample can hold both
         speech and environmental sound
speech   the recorded questions alone, to be transcribed
"""

import random
from collections.abc import Mapping, Sequence

from PIL import Image

from .clips import Clip, load_clips
from .concepts import TRAINED
from .questions import name_answer
from .scenes import moving, one_after_another
from .sounds import ANSWERS, QUESTIONS, sound
from .sprites import Artist
from .writer import Writer, media_part, text_part

VIDEO_QUESTIONS = {
    "first": ("What comes first?", "What do you see first?"),
    "last": ("What comes last?", "What do you see last?"),
    "moves": ("Which way does it move?", "Where does it go?"),
    "name": ("What is in the video?", "What moves here?"),
}
DIRECTIONS = {"left": "Left.", "right": "Right.", "up": "Up.", "down": "Down."}
SPOKEN = "What is this?"
"""The recorded question about environmental sounds."""
TRANSCRIBE = "Write down what was said."


def add_extended(
    writer: Writer,
    seed: int,
    artist: Artist,
    photos: Mapping[str, Sequence[Image.Image]],
    videos: int,
    sounds: int,
    questions: int,
    test_speed: float,
) -> None:
    """Write train, val and test ``.videos`` and ``.sounds``, ``test.sounds_asked`` and ``test.speech``.

    Args:
        photos: backgrounds of the splits ``train`` and ``test``.
        videos: number of training videos.
        sounds: number of training clips of environmental sound.
        questions: test questions of each kind about videos, and of each other set.
        test_speed: playback speed of the recordings in tests.
    """
    clips, test_voices = load_clips()
    heard = [clip for clip in clips if clip.voice not in test_voices]
    asking = [clip for clip in heard if clip.text == SPOKEN]
    kinds = list(VIDEO_QUESTIONS)
    for part, count in (("train", videos), ("val", 16), ("test", questions * len(kinds))):
        for i in range(count):
            rng = random.Random(f"{seed}:film:{part}:{i}")  # the name that 0.1 drew the same data with
            _video(
                writer,
                part,
                kinds[i % len(kinds)],
                artist,
                photos["test" if part == "test" else "train"],
                rng,
            )
    names = list(ANSWERS)
    for part, count in (("train", sounds), ("val", 12), ("test", questions)):
        for i in range(count):
            rng = random.Random(f"{seed}:sound:{part}:{i}")
            _sound(writer, part, names[i % len(names)], asking, test_speed, rng)
    for clip in random.Random(f"{seed}:speech").sample(heard, min(questions, len(heard))):
        parts = [media_part("speech", writer.clip(clip, test_speed)), text_part(TRANSCRIBE)]
        writer.add("test.speech", [(parts, clip.text)], kind="speech", speaker=clip.voice)


def _video(
    writer: Writer, part: str, kind: str, artist: Artist, photos: Sequence[Image.Image], rng: random.Random
) -> None:
    first, last = rng.sample(TRAINED, 2)
    direction = rng.choice(list(DIRECTIONS))
    if kind in ("first", "last"):
        frames = one_after_another(first, last, artist, rng.choice(photos), rng)
        answer = name_answer(first if kind == "first" else last)
    else:
        frames = moving(first, direction, artist, rng.choice(photos), rng)
        answer = DIRECTIONS[direction] if kind == "moves" else name_answer(first)
    parts = [
        media_part("video", writer.video(frames, f"{part}.videos")),
        text_part(rng.choice(VIDEO_QUESTIONS[kind])),
    ]
    writer.add(f"{part}.videos", [(parts, answer)], kind=kind)


def _sound(
    writer: Writer, part: str, name: str, asking: Sequence[Clip], test_speed: float, rng: random.Random
) -> None:
    file = media_part("audio", writer.audio(sound(name, rng), f"{part}.sounds"))
    question, clip = text_part(rng.choice(QUESTIONS)), rng.choice(asking)
    spoken = media_part("speech", writer.clip(clip, test_speed if part == "test" else 1.0))
    if part == "test":
        writer.add("test.sounds", [([file, question], ANSWERS[name])], kind=name)
        facts = {"kind": name, "speaker": clip.voice, "question": SPOKEN}
        writer.add("test.sounds_asked", [([spoken, file], ANSWERS[name])], **facts)
        return
    parts = [file, question] if part == "val" or rng.random() < 0.5 else [spoken, file]
    writer.add(f"{part}.sounds", [(parts, ANSWERS[name])], kind=name)
