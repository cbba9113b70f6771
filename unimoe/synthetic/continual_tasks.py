"""The embedded stream: tasks over the default parts with similar questions and conflicting answers.

    animals    "What is this?"          A dog.            image of one animal
    counting   "How many are there?"    3                 one to four objects of a kind
    food       "What is this?"          food: apple       the question of animals, another form of answer
    words      "What do you see?"       "cat"             a word written over an image of something else
    commands   (spoken)                 asks: colour      the type of the spoken question, not its answer
    sounds     "What is this?"          hear: rain        one of twelve environmental sounds
    position   "Where is the dog?"      top left          one object, in one of four corners
    text       "More than one: dog"     DOGS              plurals and first letters, no image

Animals, food and sounds ask the same question and expect different forms of answer; words asks what an image
shows and expects what is written on it; commands expects the type of questions that other tasks answer.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import soundfile
from PIL import Image, ImageDraw, ImageFont

from unimoe.errors import UserError
from unimoe.files import atomic_folder
from unimoe.prepare.cache import default_part

from .clips import load_clips
from .concepts import TRAINED, Concept
from .questions import FORMS, name_answer
from .scenes import SIZE, several, single
from .sounds import ANSWERS, sound
from .sprites import Artist, background, load_photos, open_artist, split_photos, vary

CORNERS = ("top left", "top right", "bottom left", "bottom right")
WRITTEN = ("cat", "bus", "pizza", "owl", "rocket", "key", "bee", "guitar", "apple", "snail", "crown", "zebra")
"""Words that are written on images."""
ASKED = {
    "name": "name",
    "group": "kind",
    "colour": "colour",
    "count": "number",
    "left": "left",
    "right": "right",
}
"""Type of a recorded question -> its name in the task commands; yes/no questions are "check"."""

Item = tuple[list[dict[str, Any]], str]
"""User parts and the right answer; media are decoded and saved by the writer."""


def build_tasks(folder: str = "runs/continual/data", train: int = 320, test: int = 60, seed: int = 0) -> None:
    """Write the embedded stream: NAME.train.jsonl and NAME.test.jsonl of every task, and their media.

    Training and test data differ in photographs, views, voices and, for text, in words.

    Args:
        folder: where to write; an existing folder is replaced.
        train: training samples per task.
        test: test questions per task.
        seed: seed of every random choice.

    Raises:
        UserError: for fewer than one sample or question.
    """
    if train < 1 or test < 1:
        raise UserError(f"--train and --test must be at least 1, found {train} and {test}")
    artist = open_artist(default_part("sprites"))
    grounds = [list(part.values()) for part in split_photos(load_photos(default_part("photos")))]
    with atomic_folder(folder) as temporary:
        for name, make in TASKS.items():
            for part, count, photos in zip(("train", "test"), (train, test), grounds, strict=True):
                rng = random.Random(f"{seed}:{name}:{part}")
                items = make(artist, photos, rng, part == "test")
                lines = [_line(temporary, f"{name}.{part}", index, next(items)) for index in range(count)]
                (temporary / f"{name}.{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(folder: Path, file: str, index: int, item: Item) -> str:
    parts, answer = item
    saved = []
    for part in parts:
        if part["type"] == "text":
            saved.append(part)
            continue
        path = Path("media") / file / f"{index:05d}{'.jpg' if part['type'] == 'image' else '.flac'}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if part["type"] == "image":
            part["image"].save(folder / path, quality=92)
        else:
            soundfile.write(folder / path, part[part["type"]], 16000, subtype="PCM_16")
        saved.append({"type": part["type"], "path": path.as_posix()})
    messages = [
        {"role": "user", "content": saved},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return json.dumps({"id": f"{file}-{index}", "messages": messages})


# -------------------------------------------------------------------- the tasks, as endless generators

Make = Callable[[Artist, list[Image.Image], random.Random, bool], Iterator[Item]]
"""Makes items from an artist, photographs, a random generator, and whether they are for the test."""


def _seen(image: Image.Image, question: str, answer: str) -> Item:
    return [{"type": "image", "image": image}, {"type": "text", "text": question}], answer


def _named(group: str, say: Callable[[Concept], str]) -> Make:
    def make(artist: Artist, photos: list[Image.Image], rng: random.Random, test: bool) -> Iterator[Item]:
        members = [concept for concept in TRAINED if concept.group == group]
        while True:
            for concept in rng.sample(members, len(members)):
                scene = single(concept, artist, rng.choice(photos), rng)
                yield _seen(scene.image, rng.choice(FORMS["name"][:3]), say(concept))

    return make


def _counting(artist: Artist, photos: list[Image.Image], rng: random.Random, test: bool) -> Iterator[Item]:
    while True:
        for count in rng.sample(range(1, 5), 4):
            scene = several(rng.choice(TRAINED), count, artist, rng.choice(photos), rng)
            yield _seen(scene.image, rng.choice(FORMS["count"]), str(count))


def _words(artist: Artist, photos: list[Image.Image], rng: random.Random, test: bool) -> Iterator[Item]:
    while True:
        for word in rng.sample(WRITTEN, len(WRITTEN)):
            shown = rng.choice([concept for concept in TRAINED if concept.name != word])
            image = single(shown, artist, rng.choice(photos), rng).image
            draw, font = ImageDraw.Draw(image), ImageFont.load_default(rng.randint(40, 50))
            width, height = (round(end) for end in draw.textbbox((0, 0), word, font=font)[2:])
            x, y = rng.randint(0, max(0, SIZE - width)), rng.randint(0, SIZE - height)
            draw.rectangle((x - 4, y, x + width + 4, y + height + 6), fill="white")
            draw.text((x, y), word, font=font, fill="black")
            yield _seen(image, "What do you see?", f'"{word}"')


def _commands(artist: Artist, photos: list[Image.Image], rng: random.Random, test: bool) -> Iterator[Item]:
    clips, test_voices = load_clips()
    kinds = {text: ASKED[kind] for kind, texts in FORMS.items() for text in texts}
    by_kind: dict[str, list] = {}
    for clip in clips:
        if (clip.voice in test_voices) == test:
            by_kind.setdefault(kinds.get(clip.text, "check"), []).append(clip)
    while True:
        for kind in rng.sample(sorted(by_kind), len(by_kind)):
            clip = rng.choice(by_kind[kind]).at_speed(1.0 if test else rng.choice((0.9, 1.0, 1.1)))
            yield [{"type": "speech", "speech": clip.samples}], f"asks: {kind}"


def _sounds(artist: Artist, photos: list[Image.Image], rng: random.Random, test: bool) -> Iterator[Item]:
    while True:
        for kind in rng.sample(sorted(ANSWERS), len(ANSWERS)):
            question = {"type": "text", "text": FORMS["name"][0]}
            yield [{"type": "audio", "audio": sound(kind, rng)}, question], f"hear: {kind}"


def _position(artist: Artist, photos: list[Image.Image], rng: random.Random, test: bool) -> Iterator[Item]:
    half = SIZE // 2
    while True:
        for corner in rng.sample(range(4), 4):
            concept = rng.choice(TRAINED)
            ground = background(rng.choice(photos), rng, SIZE)
            sprite = artist.sprite(concept.char)
            assert sprite is not None
            view = vary(sprite, rng, half * rng.uniform(0.8, 1.0))
            view.thumbnail((half, half))
            x, y = corner % 2 * half, corner // 2 * half
            ground.paste(
                view, (x + rng.randint(0, half - view.width), y + rng.randint(0, half - view.height)), view
            )
            yield _seen(ground, f"Where is the {concept.name}?", CORNERS[corner])


def _text(artist: Artist, photos: list[Image.Image], rng: random.Random, test: bool) -> Iterator[Item]:
    words = [c.name for c in TRAINED if " " not in c.name and c.name[-1] not in "syx"]
    words = words[::4] if test else [word for index, word in enumerate(words) if index % 4]
    while True:
        for word in rng.sample(words, len(words)):
            if rng.random() < 0.5:
                yield [{"type": "text", "text": f"More than one: {word}"}], f"{word}s".upper()
            else:
                yield [{"type": "text", "text": f"First letter: {word}"}], word[0].upper()


TASKS: dict[str, Make] = {
    "animals": _named("animal", name_answer),
    "counting": _counting,
    "food": _named("food", lambda concept: f"food: {concept.name}"),
    "words": _words,
    "commands": _commands,
    "sounds": _sounds,
    "position": _position,
    "text": _text,
}
"""Tasks in the order of the stream; consecutive tasks are unlike each other."""
