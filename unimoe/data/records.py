"""One record of a data file -> Sample, in the key styles of LLaVA, Uni-MoE, ShareGPT and OpenAI.

turns     "conversations" or "messages": [{"from", "value"} or {"role", "content"}, ...]
content   a string in which <image>, <video>, <speech>, <audio> stand for media listed beside the turns,
          or a list of parts: {"type": "text"}, {"type": "image", "path": ...}, image_url, video_url,
          audio_url, input_audio
          (TRL's "prompt" and "completion", strings or lists of turns, are read as turns too)
columns   image(s), video(s), voice/speech(es), audio(s): one file or a list, in placeholder order
files     a path, a file:// URL, a data URL, bare base64, or a dictionary with path, bytes, url or base64
"""

import math
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unimoe.media.source import Part, bare_base64, decode_base64, is_data_url
from unimoe.model.configuration import MEDIA

from .errors import DataError
from .sample import Message, Sample

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""Role names of all supported styles -> ours."""

COLUMNS = {
    "image": "image",
    "images": "image",
    "video": "video",
    "videos": "video",
    "voice": "speech",  # Uni-MoE's name, with <audio> as its placeholder
    "speech": "speech",
    "speeches": "speech",
    "audio": "audio",
    "audios": "audio",
}
"""Names of media columns -> modality."""

# LLaVA puts a line break between media and text; separators are up to the chat template.
_PLACEHOLDER = re.compile(r"\n?<(image|video|speech|audio)>\n?")


def parse_record(
    record: Any, source: str, media_root: str | Path = ".", style: str = "auto", training: bool = True
) -> Sample:
    """Turn one record into a Sample whose messages are in content-part form.

    In string content a placeholder stands for the next file of its column. In a list of parts, text is text
    whatever it says, and a media part without content takes the next file of its column. Nulls (None, NaN),
    which tables leave in absent fields, are ignored.

    Args:
        record: a decoded JSON object, or a row of a table.
        source: where it was read; errors start with it.
        media_root: folder that relative paths are resolved against; every file must exist.
        style: "llava" (turns under "conversations"), "messages", or "auto" for either.
        training: the last turn must be the assistant's.

    Raises:
        DataError: the record is not a conversation, or a file is missing.
    """
    return _Record(record, source, Path(media_root), style).sample(training)


class _Record:
    """State of parsing one record: the media not yet placed, and the placeholders counted."""

    def __init__(self, record: Any, source: str, media_root: Path, style: str) -> None:
        self.source = source
        self.media_root = media_root
        self.record = self._typed(_without_nulls(record), dict, "the sample")
        self.turns = self._turns(style)
        self.waiting: dict[str, list[Part]] = {modality: [] for modality in MEDIA}
        for column, modality in COLUMNS.items():
            self.waiting[modality] += self._column(column, modality)
        self.found: dict[str, int] = dict.fromkeys(MEDIA, 0)
        self.given = {modality: len(parts) for modality, parts in self.waiting.items()}
        # Uni-MoE writes <audio> for speech: that is meant if there is speech and no other audio.
        self.audio_is_speech = bool(self.given["speech"]) and not self.given["audio"]

    def sample(self, training: bool) -> Sample:
        messages = [self._message(turn, number) for number, turn in enumerate(self.turns, 1)]
        if system := self.record.get("system"):
            text = self._typed(system, str, '"system"')
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": text}]})
        for modality in MEDIA:
            if self.found[modality] != self.given[modality]:
                media = {"speech": "speech clips", "audio": "audio clips"}.get(modality, f"{modality}s")
                places = f"{self.found[modality]} <{modality}> placeholders"
                found = f"found {places} and {self.given[modality]} {media}"
                expected = "expected equal numbers (in a part of type text a placeholder is plain text)"
                raise self._fault("placeholders", f"{found}; {expected}")
        self._check_order([message["role"] for message in messages], training)
        identifier = self.record.get("id")
        return Sample(messages, self.source, None if identifier is None else str(identifier))

    def _turns(self, style: str) -> list[Any]:
        keys = {"llava": ["conversations"], "messages": ["messages"]}.get(style, list(TURNS))
        present = [key for key in keys if self.record.get(key) is not None]
        if not present and style != "llava" and {"prompt", "completion"} <= self.record.keys():
            asked, said = self.record["prompt"], self.record["completion"]  # as TRL calls them
            asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
            said = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
            return self._typed(asked, list, '"prompt"') + self._typed(said, list, '"completion"')
        if len(present) != 1:
            expected = " or ".join(f'"{key}"' for key in keys)
            found = sorted(map(str, self.record)) or "none"
            raise self._fault("malformed", f"expected the key {expected}, found {found}")
        return self._typed(self.record[present[0]], list, f'"{present[0]}"')

    def _message(self, turn: Any, number: int) -> Message:
        here = f"turn {number}"
        self._typed(turn, dict, here)
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise self._fault("role", f"{here}: found the role {role!r}, expected one of {', '.join(ROLES)}")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, str):
            parts = self._split(content)
        elif isinstance(content, list):
            parts = [self._part(part, here) for part in content]
        else:
            raise self._fault(
                "malformed", f"{here}: expected text or a list of parts, found {_name(content)}"
            )
        parts = [part for part in parts if part["type"] != "text" or part["text"]]
        if any(_SURROGATE.search(part.get("text", "")) for part in parts):
            found = "half a character (a lone surrogate, \\ud800 to \\udfff)"
            raise self._fault("malformed", f"{here} holds {found}")
        if not any(part["type"] != "text" or part["text"].strip() for part in parts):
            raise self._fault("empty turn", f"{here} ({role}) is empty")
        role = ROLES[role]
        foreign = [part["type"] for part in parts if part["type"] != "text"]
        if role == "assistant" and foreign:
            found = f"found {foreign[0]} in an assistant turn; media belong in user turns"
            raise self._fault("placeholders", f"{here}: {found}")
        return {"role": role, "content": parts}

    def _split(self, content: str) -> list[Part]:
        parts: list[Part] = []
        for index, piece in enumerate(_PLACEHOLDER.split(content)):
            parts.append(self._next(piece) if index % 2 else {"type": "text", "text": piece})
        return parts

    def _next(self, modality: str) -> Part:
        """The next file of its column. A missing one is counted now, and reported once all are counted."""
        if modality == "audio" and self.audio_is_speech:
            modality = "speech"
        self.found[modality] += 1
        return self.waiting[modality].pop(0) if self.waiting[modality] else {"type": modality}

    def _part(self, part: Any, here: str) -> Part:
        self._typed(part, dict, f"{here}: a part")
        modality = self._typed(part.get("type"), str, f'{here}: "type"')
        if modality == "text":
            return {"type": "text", "text": self._typed(part.get("text"), str, f'{here}: "text"')}
        if modality in _URLS:
            return self._media_part(_URLS[modality], part.get(modality), here)
        if modality == "input_audio":
            value = self._typed(part.get("input_audio"), dict, f'{here}: "input_audio"')
            return self._media_part("speech", {"base64": value.get("data")}, here)
        if modality not in MEDIA:
            known = ", ".join(("text", *MEDIA, *_URLS, "input_audio"))
            raise self._fault(
                "malformed", f"{here}: found a part of type {modality!r}, expected one of {known}"
            )
        value = part.get(modality) or {key: part[key] for key in _SOURCES if key in part}
        if isinstance(value, list) and modality != "video" and len(value) == 1:
            (value,) = value
        return self._media_part(modality, value, here) if value else self._next(modality)

    def _column(self, column: str, modality: str) -> list[Part]:
        value = self.record.get(column)
        if value is None:
            return []
        if not isinstance(value, list):
            return [self._media_part(modality, value, f'"{column}"')]
        if modality != "video":  # a video may be a list of frames
            value = list(_flat(value))
        if modality == "video" and len(value) > 1 and self._count_placeholders("video") == 1:
            value = [value]  # Uni-MoE lists the frames of its only video
        return [
            self._media_part(modality, item, f'"{column}" {number}') for number, item in enumerate(value, 1)
        ]

    def _count_placeholders(self, modality: str) -> int:
        """Places in all turns that take the next file of a column."""
        contents = [turn.get("content", turn.get("value")) for turn in self.turns if isinstance(turn, dict)]
        named = sum(text.count(f"<{modality}>") for text in contents if isinstance(text, str))
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return named + parts.count({"type": modality})

    def _media_part(self, modality: str, value: Any, here: str) -> Part:
        """A part from what names its content: path, URL, base64, dict of path/bytes/url/base64, list of
        frames."""
        if isinstance(value, bytes):
            return {"type": modality, "bytes": value}
        if isinstance(value, dict):
            if isinstance(value.get("bytes"), bytes):
                return {"type": modality, "bytes": value["bytes"]}
            if isinstance(value.get("bytes"), str):  # as pandas and TSV files write them
                return {"type": modality, "bytes": self._decoded(value["bytes"], here)}
            if "stored" in value:
                return {"type": modality, "stored": value["stored"]}
            if isinstance(value.get("base64"), str):
                return {"type": modality, "bytes": self._decoded(value["base64"], here)}
            value = value.get("path") or value.get("url") or value.get("frames")
            if isinstance(value, dict):  # {"path": {"stored": ...}}: a member of a shard
                return self._media_part(modality, value, here)
        if modality == "video" and isinstance(value, list) and value:
            frames = [self._media_part("image", frame, f"{here}: a frame") for frame in value]
            keys = {key for frame in frames for key in frame if key != "type"}
            if len(keys) > 1:
                found = f"found frames given by {' and by '.join(sorted(keys))}"
                raise self._fault("malformed", f"{here}: {found}, expected one way for all")
            (key,) = keys
            return {"type": modality, key: [frame[key] for frame in frames]}
        if isinstance(value, str) and is_data_url(value):
            return {"type": modality, "url": value}
        if isinstance(value, str) and (content := bare_base64(value)) is not None:
            return {"type": modality, "bytes": content}
        return {"type": modality, "path": self._file(value, here)}

    def _file(self, value: Any, here: str) -> str:
        if not isinstance(value, str) or not value:
            found = "an empty text" if value == "" else _name(value)
            raise self._fault("malformed", f"{here}: expected a path or a data URL, found {found}")
        if re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://", value, re.IGNORECASE):
            found = f"{_shown(value)} is a remote URL; download it, expected a file"
            raise self._fault("remote address", f"{here}: {found}")
        paths = [os.path.abspath(self.media_root / name) for name in _names(value)]
        path = next((path for path in paths if os.path.exists(path)), None)
        if path is None:
            advice = " (it looks like base64 of no known format)" if len(value) > 255 else ""
            raise self._fault("missing file", f"{here}: there is no file {_shown(paths[0])}{advice}")
        if os.path.isdir(path):
            raise self._fault("missing file", f"{here}: {_shown(path)} is a folder, expected a file")
        return path

    def _decoded(self, data: str, here: str) -> bytes:
        try:
            return decode_base64(data)
        except ValueError as error:
            raise self._fault("data URL", f"{here}: not valid base64: {error}") from error

    def _check_order(self, roles: list[str], training: bool) -> None:
        turns = roles[1:] if roles[:1] == ["system"] else roles
        expected = ["user", "assistant"] * (len(turns) // 2 + 1)
        first = 1 + len(roles) - len(turns)
        for number, (found, wanted) in enumerate(zip(turns, expected, strict=False), first):
            if found != wanted:
                wrong = f"roles out of order: turn {number} is from {found}, expected {wanted}"
                raise self._fault("order", wrong)
        if not turns:
            raise self._fault("order", "there are no turns")
        if training and turns[-1] != "assistant":
            missing = "the last turn is the user's; training needs an assistant turn at the end"
            raise self._fault("order", missing)

    def _typed(self, value: Any, wanted: type, what: str) -> Any:
        if not isinstance(value, wanted):
            raise self._fault("malformed", f"{what} must be {_NAMES[wanted]}, found {_name(value)}")
        return value

    def _fault(self, modality: str, message: str) -> DataError:
        return DataError(modality, self.source, message)


TURNS = ("conversations", "messages")
_SOURCES = ("path", "bytes", "url", "base64", "stored")
_URLS = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
_SURROGATE = re.compile("[\ud800-\udfff]")

_NAMES = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "a bool"}


def _name(value: Any) -> str:
    return "nothing" if value is None else _NAMES.get(type(value), type(value).__name__)


def _without_nulls(value: Any) -> Any:
    """``value`` without the entries of dictionaries and lists that are None, NaN, or a dictionary of these
    alone."""
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if not _is_null(kept := _without_nulls(item))}
    if isinstance(value, list):
        return [kept for item in value if not _is_null(kept := _without_nulls(item))]
    return value


def _is_null(value: Any) -> bool:
    return value is None or value == {} or (isinstance(value, float) and math.isnan(value))


def _flat(items: list[Any]) -> Iterator[Any]:
    """The entries of lists of lists, in order: images nested by turn."""
    for item in items:
        if isinstance(item, list):
            yield from _flat(item)
        else:
            yield item


def _names(value: str) -> Iterator[str]:
    """The file names that a path or ``file:`` URL may mean, the likeliest first."""
    if value[:5].lower() == "file:":
        value = value[5:].removeprefix("//").removeprefix("localhost")
        yield value  # not percent-encoded, as some write it
        yield urllib.parse.unquote(value)
    else:
        yield value
        yield value.replace("\\", "/")  # written on Windows


def _shown(value: str) -> str:
    """Value as messages show it: whole lines of base64 are no file names."""
    return value if len(value) <= 255 else f"{value[:80]}... ({len(value):,} characters)"
