"""The demo's data set, built from real parts: sprites on photos, recorded questions, text dialogues.

The result is a function of the seed and the parts. Training and test images share no photo and no view; the
sets ``unseen_artist`` and ``held_out`` also differ in artist and concepts, ``unseen_voice`` in the speaker.
"""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from unimoe.files import atomic_folder
from unimoe.prepare.cache import default_part

from .clips import ASSETS, Clip, load_clips
from .concepts import HELD_OUT, TRAINED, Concept
from .extended import TRANSCRIBE, add_extended
from .questions import SPOKEN_CONCEPTS, ask
from .scenes import Scene, pair, several, single
from .sprites import Artist, load_photos, open_artist, split_photos
from .writer import Writer, media_part, text_part

_OTHER_KINDS = ("group", "colour", "colour", "yes_no")
"""Colours are asked twice as often as the others."""


@dataclass
class BuildConfig:
    """Size of the data set."""

    views: int = 45
    """Training images of each concept alone."""
    restyle: float = 0.6
    """Share of the training images with style augmentation (outlines and exact hues of the artist removed);
    half of these also get a recoloured background."""
    plain: float = 0.1
    """Share of the training images on a plain background."""
    counts: int = 450
    """Training images with one to four copies of a sprite."""
    pairs: int = 900
    """Training images with two sprites side by side."""
    test_views: int = 3
    """Test images of each concept, per test set."""
    test_questions: int = 30
    """Questions of each kind in the test sets asked in writing and aloud."""
    speeds: tuple[float, ...] = (0.88, 1.0, 1.14)
    """Playback speeds of the recordings in training."""
    test_speed: float = 1.06
    """Playback speed of the training speakers in tests, so that no test clip occurs in training."""
    videos: int = 480
    """Training videos of the extended demo."""
    sounds: int = 360
    """Training clips of environmental sound in the extended demo."""
    seed: int = 0


def build_data(
    folder: str | Path,
    seed: int = 0,
    config: BuildConfig | None = None,
    sprites: str | Path | None = None,
    photos: str | Path | None = None,
    unseen_artist: str | Path | None = None,
    extended: bool = False,
) -> Path:
    """Write the demo's data set to ``folder`` and return its path.

    ``sprites`` and ``photos`` default to the prepared parts; ``unseen_artist`` is an emoji font or a folder
    of emoji images by another artist, used for a test set only (``test.unseen_artist.jsonl`` is not written
    without it). Files, all messages JSONL with media paths relative to ``folder``:

    * ``train.image`` asks for the name of the object in an image, ``train.questions`` for group, colour,
      yes or no, ``train.positions`` for count, left and right; ``train.spoken`` asks all of these aloud,
      ``train.transcribe`` asks for a transcript, ``train.text`` is text dialogue. ``val.image``,
      ``val.spoken``, ``val.transcribe`` and ``val.text`` are their validation splits.
    * ``test.new_backgrounds``, ``test.unseen_artist`` and ``test.held_out`` ask for names;
      ``test.text_questions``, ``test.spoken_questions`` and ``test.unseen_voice`` hold the same questions on
      the same images: written, spoken, and spoken by an unseen speaker.
    * with ``extended``, the files of :mod:`unimoe.synthetic.extended`.
    * ``regions`` say where each object is, in ``train.image``, ``train.positions`` and ``val.image`` (see
      :mod:`unimoe.stages.warm_start`).
    * ``manifest.json``: concepts, photos, speakers and artists of the splits, and the samples per file.

    Raises:
        UserError: a part is missing, or an artist has no drawing of a concept.
    """
    config = config or BuildConfig()
    config.seed = seed
    artist = open_artist(sprites or default_part("sprites"))
    train_photos, test_photos = split_photos(load_photos(photos or default_part("photos")))
    with atomic_folder(folder) as temporary:
        writer = Writer(temporary)
        _train(writer, config, artist, list(train_photos.values()))
        other = open_artist(unseen_artist) if unseen_artist else None
        _tests(writer, config, artist, other, list(test_photos.values()))
        if extended:
            grounds = {"train": list(train_photos.values()), "test": list(test_photos.values())}
            numbers = (config.videos, config.sounds, 2 * config.test_questions, config.test_speed)
            add_extended(writer, seed, artist, grounds, *numbers)
        writer.close()
        manifest = {
            "config": asdict(config),
            "concepts": {"trained": [c.name for c in TRAINED], "held_out": [c.name for c in HELD_OUT]},
            "photos": {"train": list(train_photos), "test": list(test_photos)},
            "voices": {"train": _voices(False), "test": _voices(True)},
            "artists": {
                "train": artist.path.name,
                "test": Path(unseen_artist).name if unseen_artist else None,
            },
            "samples": {file: len(lines) for file, lines in sorted(writer.lines.items())},
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def _voices(test: bool) -> list[str]:
    clips, test_voices = load_clips()
    return sorted({clip.voice for clip in clips if (clip.voice in test_voices) == test})


def _rng(config: BuildConfig, *key: object) -> random.Random:
    return random.Random(":".join(map(str, (config.seed, *key))))


def _train(writer: Writer, config: BuildConfig, artist: Artist, photos: list[Image.Image]) -> None:
    clips, test_voices = load_clips()
    by_text: dict[str, list[Clip]] = {}
    for clip in clips:
        if clip.voice not in test_voices:
            by_text.setdefault(clip.text, []).append(clip)

    def put(part: str, scene: Scene, written: Sequence[str], spoken: str | None, rng: random.Random) -> None:
        """Add one image with questions of these kinds; without ``spoken``, its object is also asked for in
        writing and aloud by questions of random kinds."""
        path = writer.image(scene.image, part)
        for asked in written:
            question, reply = ask(asked, scene, rng)
            file = "train.positions" if part == "train" and asked != "name" else f"{part}.image"
            parts = [media_part("image", path), text_part(question)]
            writer.add(file, [(parts, reply)], kind=asked, regions=scene.regions)
        others = [kind for kind in _OTHER_KINDS if kind != "colour" or scene.colour]
        if spoken is None:
            asked = rng.choice(others)
            question, reply = ask(asked, scene, rng, _likely(scene.shown[0], rng))
            file = "train.questions" if part == "train" else "val.image"
            writer.add(file, [([media_part("image", path), text_part(question)], reply)], kind=asked)
        asked = spoken or rng.choice(["name", "name", *others])
        question, reply = ask(asked, scene, rng, list(SPOKEN_CONCEPTS))
        if question not in by_text:  # no yes/no question was recorded for this concept
            asked = "name"
            question, reply = ask(asked, scene, rng)
        clip, speed = rng.choice(by_text[question]), rng.choice(config.speeds)
        writer.add(
            f"{part}.spoken",
            [([media_part("image", path), media_part("speech", writer.clip(clip, speed))], reply)],
            kind=asked,
            question=question,
        )

    for part, views in (("train", config.views), ("val", 1)):
        for view in range(views):
            for concept in TRAINED:
                rng = _rng(config, part, "single", concept.name, view)
                photo = None if rng.random() < config.plain else rng.choice(photos)
                scene = single(concept, artist, photo, rng, restyle=rng.random() < config.restyle)
                put(part, scene, ["name"], None, rng)
    for part, number in (("train", config.counts), ("val", 16)):
        for i in range(number):
            rng = _rng(config, part, "count", i)
            scene = several(
                rng.choice(TRAINED),
                i % 4 + 1,
                artist,
                rng.choice(photos),
                rng,
                restyle=rng.random() < config.restyle,
            )
            put(part, scene, ["count"], "count", rng)
    for part, number in (("train", config.pairs), ("val", 16)):
        for i in range(number):
            rng = _rng(config, part, "pair", i)
            left, right = rng.sample(TRAINED, 2)
            scene = pair(left, right, artist, rng.choice(photos), rng, restyle=rng.random() < config.restyle)
            put(part, scene, ["left", "right"], ("left", "right")[i % 2], rng)
    for text in by_text:
        for clip in by_text[text]:
            for speed in config.speeds:
                rng = _rng(config, "transcribe", text, clip.voice, speed)
                part = "val" if rng.random() < 0.05 else "train"
                parts = [media_part("speech", writer.clip(clip, speed)), text_part(TRANSCRIBE)]
                ends = [round(end / 16000, 3) for end in clip.at_speed(speed).word_ends]
                words = [list(pair) for pair in zip(text.strip("?.").split(), ends, strict=True)]
                writer.add(f"{part}.transcribe", [(parts, text)], kind="transcribe", words=words)
    dialogues = (ASSETS / "dialogue.jsonl").read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(dialogues):
        turns = [([text_part(user)], reply) for user, reply in json.loads(line)["turns"]]
        writer.add("val.text" if i % 20 == 7 else "train.text", turns, kind="text")


def _likely(shown: Concept, rng: random.Random) -> list[Concept]:
    """Concepts to draw the wrong ones of yes/no questions from: half of the time the same group."""
    return [c for c in TRAINED if c.group == shown.group] if rng.random() < 0.5 else list(TRAINED)


def _tests(
    writer: Writer, config: BuildConfig, artist: Artist, other: Artist | None, photos: list[Image.Image]
) -> None:
    sets = [("new_backgrounds", TRAINED, artist), ("held_out", HELD_OUT, artist)]
    for name, concepts, hand in [*sets, *([("unseen_artist", TRAINED, other)] if other else [])]:
        for view in range(config.test_views):
            for concept in concepts:
                rng = _rng(config, name, concept.name, view)
                scene = single(concept, hand, rng.choice(photos), rng)
                path = writer.image(scene.image, name)
                question, reply = ask("name", scene, rng)
                writer.add(
                    f"test.{name}",
                    [([media_part("image", path), text_part(question)], reply)],
                    kind="name",
                    concept=concept.name,
                )
    clips, test_voices = load_clips()
    recorded = {(clip.voice, clip.text): clip for clip in clips}
    voices = sorted({clip.voice for clip in clips} - set(test_voices))
    made: Counter[str] = Counter()
    for kind in ("name", "group", "colour", "count", "left", "right", "yes_no"):
        attempt = 0
        while made[kind] < config.test_questions:
            rng = _rng(config, "questions", kind, attempt)
            attempt += 1
            concept = rng.choice(SPOKEN_CONCEPTS)
            if kind == "count":
                scene = several(concept, made[kind] % 4 + 1, artist, rng.choice(photos), rng)
            elif kind in ("left", "right"):
                left, right = rng.sample(TRAINED, 2)
                scene = pair(left, right, artist, rng.choice(photos), rng)
            else:
                scene = single(concept, artist, rng.choice(photos), rng)
            if kind == "colour" and scene.colour is None:
                continue
            question, reply = ask(kind, scene, rng, list(SPOKEN_CONCEPTS))
            made[kind] += 1
            image = media_part("image", writer.image(scene.image, "questions"))
            facts = {"kind": kind, "question": question}
            writer.add("test.text_questions", [([image, text_part(question)], reply)], **facts)
            heard = recorded[rng.choice(voices), question]
            spoken = media_part("speech", writer.clip(heard, config.test_speed))
            writer.add("test.spoken_questions", [([image, spoken], reply)], speaker=heard.voice, **facts)
            heard = recorded[rng.choice(test_voices), question]
            writer.add(
                "test.unseen_voice",
                [([image, media_part("speech", writer.clip(heard, 1.0))], reply)],
                speaker=heard.voice,
                **facts,
            )
