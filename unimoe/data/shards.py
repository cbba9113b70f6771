"""WebDataset shards: uncompressed tar archives in which neighbouring files of one basename are a sample.

    000.json 000.jpg 000.wav 001.json ...  ->  {..., "images": [{"stored": TarMember}], ...}

Only headers and JSON are read; media stay where they are, so samples can be drawn in any order.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from unimoe.errors import UserError

from .errors import DataError
from .records import COLUMNS, TURNS

MEDIA_SUFFIXES = {
    "image": "jpg jpeg jpe jfif png webp gif bmp tif tiff ppm pgm pbm avif heic heif jp2 j2k tga",
    "video": "mp4 webm mkv mov avi m4v ts m2ts mpg mpeg wmv flv ogv 3gp 3g2",
    "audio": "wav flac mp3 ogg oga opus m4a aac aif aiff wma weba amr caf",
}
"""File name extensions of each modality, separated by blanks. The record says whether audio is speech."""

_MODALITY = {suffix: modality for modality, suffixes in MEDIA_SUFFIXES.items() for suffix in suffixes.split()}
_SAMPLE = re.compile(r"(?!\.|__)[^.]+\..+")
_END = 512  # bytes of zeros that end an archive, at least


@dataclass(frozen=True)
class TarMember:
    """A file inside an uncompressed tar archive."""

    shard: str
    """Path of the archive."""
    name: str
    """Name in the archive."""
    offset: int
    """First byte in the archive."""
    size: int
    """Bytes."""

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(0, f"found {len(content)} bytes of {self.size}; the archive is truncated")
        return content

    def __str__(self) -> str:
        return f"{self.name} in {self.shard}"


def shard_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (``shard:basename``, record or DataError) for each sample of a shard.

    The record is the ``.json`` file's, with the sample's media added to it: where it names a file of the
    sample, in a column or in a part of a message, that file; otherwise each item is the next file of its
    modality, in the order of the archive. A ``.txt`` without a ``.json`` is the caption of the sample's
    media. Files whose names begin with ``.`` or ``__``, or have no ending (READMEs, macOS's forks), belong to
    no sample. The last fault is that the archive is truncated or broken.
    """
    for key, members in groupby(_members(path), key=lambda entry: _split(entry)[0]):
        if not key:
            yield str(path), next(members)
            continue
        source = f"{path}:{key}"
        try:
            files = {member.name: member for member in members if isinstance(member, TarMember)}
            yield source, _record(files, source)
        except DataError as fault:
            yield source, fault


def _members(path: Path) -> Iterator[TarMember | DataError]:
    """The files of an archive; then a fault if it is truncated or broken."""
    try:
        with tarfile.open(path, "r:") as archive:
            for entry in archive:
                if entry.isfile() and _SAMPLE.fullmatch(Path(entry.name).name):
                    yield TarMember(str(path), entry.name, entry.offset_data, entry.size)
        if wrong := _end_fault(path, archive.offset):
            yield DataError("truncated", str(path), wrong)
    except tarfile.TarError as error:
        expected = "expected an uncompressed tar archive"
        yield DataError("truncated", str(path), f"the archive is broken or truncated: {error}; {expected}")
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror}") from error


def _end_fault(path: Path, offset: int) -> str | None:
    """What is wrong with an archive behind the last member that can be read: only zeros may follow."""
    with path.open("rb") as file:
        file.seek(offset)
        mark = file.read(_END)
        if len(mark) < _END:
            return "the archive is truncated: it has no end mark"
        if any(mark):
            return f"the archive is broken: found no file header at byte {offset:,}, and no end mark"
        at = offset
        while block := file.read(_END):
            at += _END
            if any(block):
                found = f"found an end mark at byte {offset:,} and something else at byte {at:,}"
                return f"the archive is broken: {found}, expected zeros (tar --concatenate joins archives)"
    return None


def _split(entry: TarMember | DataError) -> tuple[str, str]:
    """Basename (with folders) and ending of a member, parted at the first dot of its file's name."""
    if isinstance(entry, DataError):
        return "", ""
    match = re.fullmatch(r"((?:.*/)?[^/.]+)\.?([^/]*)", entry.name)
    return (match[1], match[2].lower()) if match else (entry.name, "")


def _record(files: dict[str, TarMember], source: str) -> Any:
    endings = {_split(member)[1]: member for member in files.values()}
    media = {ending: member for ending, member in endings.items() if ending.rpartition(".")[2] in _MODALITY}
    text = _text(endings["json"], source) if "json" in endings else None
    if text is None:
        if "txt" not in endings or not media:
            raise DataError("malformed", source, f"expected a .json file, found {', '.join(files)}")
        answer = {"role": "assistant", "content": _text(endings["txt"], source).strip()}
        modalities = [_modality(ending, "") for ending in media]
        record: Any = {"messages": [{"role": "user", "content": [{"type": k} for k in modalities]}, answer]}
        text = ""
    else:
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError("not JSON", source, f"{endings['json'].name} is not JSON: {error}") from error
        if not isinstance(record, dict):
            return record  # parsing it says what is wrong
    named = {**{Path(name).name: member for name, member in files.items()}, **files, **endings}
    given, placed = set(), set[TarMember]()
    for column, modality in COLUMNS.items():
        if record.get(column):
            record[column] = _resolve(record[column], named, placed)
            given.add(modality)
    for part in _parts(record):
        part |= {key: _resolve(value, named, placed) for key, value in part.items() if key != "type"}
    for ending, member in media.items():
        modality = _modality(ending, text)
        if modality not in given and member not in placed:
            record.setdefault(_COLUMN[modality], []).append({"stored": member})
    return {"id": _split(next(iter(files.values())))[0], **record}


_COLUMN = {"image": "images", "video": "videos", "speech": "speeches", "audio": "audios"}


def _modality(ending: str, text: str) -> str:
    """Modality of a file: audio is speech if its ending or the text says so (``0.speech.wav``, <speech>)."""
    modality = _MODALITY[ending.rpartition(".")[2]]
    if modality != "audio":
        return modality
    says_audio = "audio" in ending.split(".")
    says_speech = "speech" in ending.split(".") or "<speech>" in text or '"speech"' in text
    return "speech" if says_speech and not says_audio else "audio"


def _parts(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The media parts of its messages."""
    turns = [turn for key in TURNS if isinstance(record.get(key), list) for turn in record[key]]
    for turn in turns:
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") != "text":
                yield part


def _resolve(value: Any, named: dict[str, TarMember], placed: set[TarMember]) -> Any:
    """``value`` with members in the place of their names; these are added to ``placed``."""
    if isinstance(value, list):
        return [_resolve(item, named, placed) for item in value]
    if isinstance(value, dict):
        return {key: _resolve(item, named, placed) for key, item in value.items()}
    if not isinstance(value, str) or value not in named:
        return value
    placed.add(named[value])
    return {"stored": named[value]}


def _text(member: TarMember, source: str) -> str:
    try:
        return member.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("not JSON", source, f"{member.name} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise DataError("truncated", source, f"{member}: {error.strerror}") from error
