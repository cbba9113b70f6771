"""``unimoe data show``: drawn samples as an HTML page, with a model's tokens and those it is trained on."""

import io
import random
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

import jinja2
import soundfile
from PIL.Image import Image

from unimoe.data.collate import Collator
from unimoe.data.errors import DataError
from unimoe.data.read import data_files, scan_records
from unimoe.data.records import parse_record
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
_SECONDS = 30.0  # of audio that can be played
_LONGEST = 600.0  # seconds of audio that are read at all, as for training
_RATE = 16000
_FAULTS = 20  # that are listed


@dataclass(frozen=True)
class Token:
    """One token, or several shown as one: the bytes of a character, the tokens of one image."""

    text: str
    ids: str
    learned: bool
    special: bool
    times: int = 1


@dataclass(frozen=True)
class Media:
    """An image, video or audio clip as the page shows it."""

    modality: str
    name: str
    images: tuple[str, ...] = ()
    """Data URLs."""
    audio: str = ""
    """Data URL."""


@dataclass(frozen=True)
class Shown:
    """A sample on the page."""

    source: str
    modality: str
    tokens: list[Token]
    length: int
    learned: int
    media: list[Media]


@dataclass(frozen=True)
class Skipped:
    """A drawn sample that cannot be shown."""

    source: str
    reason: str


def show(
    path: str,
    output: str = "samples.html",
    model: str = "default",
    count: int = 12,
    images: str | None = None,
    seed: int = 0,
) -> int:
    """Write an HTML page of drawn samples with their tokens; those that are trained on are marked.

    Faulty samples are reported and skipped; the exit status is then 1.

    Args:
        path: file of conversations, as for data check.
        output: the page.
        model: whose tokens: a finished stage's folder, an LLM (media are then one token each), or default.
        count: samples to draw, each modality in turn.
        images: folder of the media files, if it is not the data file's own.
        seed: seed of the drawing.
    """
    if count < 1:
        raise UserError(f"--count must be at least 1, found {count}")
    samples, faults = _readable(path, images)
    collator = Collator(open_processor(model))
    drawn = [_try_to_show(sample, collator) for sample in draw(samples, count, seed)]
    good = [sample for sample in drawn if isinstance(sample, Shown)]
    faults += [f"{sample.source}: {sample.reason}" for sample in drawn if isinstance(sample, Skipped)]
    modalities = Counter(sample.modality for sample in samples)
    template = files("unimoe.commands").joinpath("samples.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        path=path,
        model=model,
        modalities=modalities.most_common(),
        total=len(samples),
        samples=good,
        skipped=[sample for sample in drawn if isinstance(sample, Skipped)],
    )
    atomic_write(output, page)
    print(f"{len(good)} of {len(samples)} samples in {output}")
    for fault in faults[:_FAULTS]:
        print(f"skipped: {fault}")
    if len(faults) > _FAULTS:
        print(f"and {len(faults) - _FAULTS} more; `unimoe data check {path}` lists all")
    return int(bool(faults))


def _readable(path: str, media_root: str | None) -> tuple[list[Sample], list[str]]:
    """The samples of all files, and what is wrong with the others. Raises UserError when there are none."""
    samples: list[Sample] = []
    faults: list[str] = []
    for file in data_files(path):
        root = file.parent if media_root is None else media_root
        try:
            for source, record in scan_records(file):
                try:
                    if isinstance(record, DataError):
                        raise record
                    samples.append(parse_record(record, source, root))
                except DataError as error:
                    faults.append(str(error))
        except UserError as error:
            faults.append(str(error))
    if not samples:
        raise UserError(faults[0] if faults else f"{path}: the file holds no samples")
    return samples, faults


def draw(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    """Random samples, each modality in turn while it has some, in the order of the file."""
    indices = list(range(len(samples)))
    random.Random(seed).shuffle(indices)
    turn: Counter[str] = Counter()
    ranked = []
    for index in indices:
        ranked.append((turn[samples[index].modality], index))
        turn[samples[index].modality] += 1
    return [samples[index] for index in sorted(index for _, index in sorted(ranked)[:count])]


def _try_to_show(sample: Sample, collator: Collator) -> Shown | Skipped:
    try:
        return shown(sample, collator)
    except UserError as error:
        return Skipped(sample.source, str(error).removeprefix(f"{sample.source}: "))


def shown(sample: Sample, collator: Collator) -> Shown:
    """What the page shows of a sample.

    Raises:
        UserError: media cannot be decoded, or the model cannot encode the sample.
    """
    batch = collator([sample])
    assert "labels" in batch  # which a collator gives
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return Shown(
        sample.source,
        sample.modality,
        tokens(ids, labels, collator.processor.tokenizer),
        len(ids),
        sum(label != IGNORED for label in labels),
        [_media(part, sample.source) for part in sample.media()],
    )


def tokens(ids: list[int], labels: list[int], tokenizer: Any) -> list[Token]:
    """The tokens as text. Tokens that form a character only together are merged into one."""
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


def _media(part: Part, where: str) -> Media:
    modality, name = part["type"], describe(part)
    if modality in ("image", "video"):
        frames = [load_image(part, where)] if modality == "image" else load_video(part, where, _FRAMES)
        return Media(modality, name, images=tuple(map(_thumbnail, frames)))
    samples = load_audio(part, where, _RATE, _LONGEST)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples[: int(_SECONDS * _RATE)], _RATE, format="OGG", subtype="VORBIS")
    more = " or more" if len(samples) >= _LONGEST * _RATE else ""
    audio = data_url("audio/ogg", buffer.getvalue())
    return Media(modality, f"{name}, {len(samples) / _RATE:.1f} s{more}", audio=audio)


def _thumbnail(image: Image) -> str:
    small = image.copy()
    small.thumbnail((_THUMB, _THUMB))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return data_url("image/jpeg", buffer.getvalue())
