"""``unimoe data show``: drawn samples as a page, with a model's tokens and what it learns of them."""

import io
import random
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2
import soundfile

from unimoe.data.collate import Collator
from unimoe.data.read import read_samples
from unimoe.data.sample import Sample
from unimoe.errors import UserError
from unimoe.files import atomic_write, data_url
from unimoe.media.audio import load_audio
from unimoe.media.image import load_image
from unimoe.media.source import Part, describe
from unimoe.media.video import load_video
from unimoe.model.configuration import IGNORED, PLACEHOLDERS
from unimoe.model.loading import open_processor

_THUMB = 320  # pixels
_FRAMES = 4  # of a video
_SECONDS = 30.0  # of a sound that can be heard
_LONGEST = 600.0  # seconds of a sound that are read at all, as for training
_RATE = 16000


@dataclass(frozen=True)
class Token:
    """One token, or several that are shown as one: halves of a character, the tokens of one medium."""

    text: str
    ids: str
    learned: bool
    special: bool
    times: int = 1


@dataclass(frozen=True)
class Medium:
    """A picture, video or sound as the page shows it."""

    kind: str
    name: str
    pictures: tuple[str, ...] = ()
    sound: str = ""


@dataclass(frozen=True)
class Shown:
    """A sample on the page."""

    source: str
    kind: str
    tokens: list[Token]
    length: int
    learned: int
    media: list[Medium]


def show(
    path: str,
    output: str = "samples.html",
    model: str = "default",
    count: int = 12,
    images: str | None = None,
    seed: int = 0,
) -> None:
    """Write an HTML page of drawn samples with their tokens; those that are learned are marked.

    Args:
        path: file of conversations, as for data check.
        output: the page.
        model: whose tokens: a finished stage's folder, an LLM (each medium is then one token), or default.
        count: samples to draw, each modality in turn.
        images: folder of the pictures and sounds, where it is not the file's own.
        seed: of the drawing.
    """
    if count < 1:
        raise UserError(f"--count must be at least 1, found {count}")
    samples = read_samples(path, media_root=images)
    collator = Collator(open_processor(model))
    drawn = draw(samples, count, seed)
    kinds = Counter(sample.modality for sample in samples)
    template = files("unimoe.commands").joinpath("samples.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        path=path,
        model=model,
        kinds=kinds.most_common(),
        total=len(samples),
        samples=[shown(sample, collator) for sample in drawn],
    )
    atomic_write(output, page)
    print(f"{len(drawn)} of {len(samples)} samples in {output}")


def draw(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    """Random samples, of every kind in turn as long as it has some, in the order of the file."""
    indices = list(range(len(samples)))
    random.Random(seed).shuffle(indices)
    turn: Counter[str] = Counter()
    ranked = []
    for index in indices:
        ranked.append((turn[samples[index].modality], index))
        turn[samples[index].modality] += 1
    return [samples[index] for index in sorted(index for _, index in sorted(ranked)[:count])]


def shown(sample: Sample, collator: Collator) -> Shown:
    """What the page shows of a sample. Raises UserError naming it when a medium cannot be decoded."""
    batch = collator([sample])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return Shown(
        sample.source,
        sample.modality,
        tokens(ids, labels, collator.processor.tokenizer),
        len(ids),
        sum(label != IGNORED for label in labels),
        [_medium(part, sample.source) for part in sample.media()],
    )


def tokens(ids: list[int], labels: list[int], tokenizer: Any) -> list[Token]:
    """The tokens as people read them. Tokens that are whole characters only together are one."""
    placeholders = {tokenizer.convert_tokens_to_ids(token) for token in PLACEHOLDERS.values()}
    special = set(tokenizer.all_special_ids) | placeholders
    found: list[Token] = []
    pairs = [(token, label != IGNORED) for token, label in zip(ids, labels, strict=True)]
    for (token, learned), run in groupby(
        pairs, lambda pair: pair if pair[0] in placeholders else (-1, pair[1])
    ):
        group = [member for member, _ in run]
        if token in placeholders:
            found.append(Token(tokenizer.decode([token]), str(token), learned, True, len(group)))
            continue
        waiting: list[int] = []
        for position, member in enumerate(group):
            waiting.append(member)
            text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
            if "\ufffd" not in text or len(waiting) == 4 or position == len(group) - 1:
                found.append(Token(text, " ".join(map(str, waiting)), learned, member in special))
                waiting = []
    return found


def _medium(part: Part, where: str) -> Medium:
    kind, name = part["type"], describe(part)
    if kind in ("image", "video"):
        frames = [load_image(part, where)] if kind == "image" else load_video(part, where, _FRAMES)
        return Medium(kind, name, pictures=tuple(map(_thumbnail, frames)))
    samples = load_audio(part, where, _RATE, _LONGEST)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples[: int(_SECONDS * _RATE)], _RATE, format="OGG", subtype="VORBIS")
    more = " or more" if len(samples) >= _LONGEST * _RATE else ""
    sound = data_url("audio/ogg", buffer.getvalue())
    return Medium(kind, f"{name}, {len(samples) / _RATE:.1f} s{more}", sound=sound)


def _thumbnail(picture: Any) -> str:
    small = picture.copy()
    small.thumbnail((_THUMB, _THUMB))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return data_url("image/jpeg", buffer.getvalue())
