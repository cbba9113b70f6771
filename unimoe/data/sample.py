"""The one in-memory form of a conversation, whichever file format it was read from."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unimoe.files import data_url
from unimoe.media.source import Part
from unimoe.model.configuration import MEDIA

Message = dict[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": list[Part]}``"""


@dataclass(frozen=True)
class Sample:
    """One conversation with its media, not yet decoded."""

    messages: list[Message]
    """Turns in order: an optional system turn, then user and assistant alternating."""

    source: str
    """Place where it was read, ``file:line`` or ``file[index]``; every error about the sample starts with
    it."""

    id: str | None = None
    """The identifier the file gives it, if any."""

    def media(self) -> Iterator[Part]:
        """The parts that are not text, in order."""
        for message in self.messages:
            for part in message["content"]:
                if part["type"] != "text":
                    yield part

    @property
    def modality(self) -> str:
        """The set of its modalities as one word, such as ``image+speech``; ``text`` if there are none."""
        present = {part["type"] for part in self.media()}
        return "+".join(name for name in MEDIA if name in present) or "text"

    def split_answer(self) -> tuple["Sample", str]:
        """The conversation without its last turn, and the text of that turn."""
        *asked, last = self.messages
        return replace(self, messages=asked), "".join(part.get("text", "") for part in last["content"])

    def to_record(self, root: str | Path) -> dict[str, Any]:
        """The sample as one object of messages JSONL: paths inside ``root`` relative to it, bytes as data
        URLs."""
        record: dict[str, Any] = {} if self.id is None else {"id": self.id}
        record["messages"] = [
            {"role": message["role"], "content": [_portable(part, Path(root)) for part in message["content"]]}
            for message in self.messages
        ]
        return record


def _portable(part: Part, root: Path) -> Part:
    def portable(value: Any) -> str:
        if key == "path":
            return _relative(value, root)
        return data_url("application/octet-stream", value if key == "bytes" else value.read())

    key = next((key for key in ("path", "bytes", "stored") if key in part), None)
    if key is None:
        return part
    value = part[key]
    value = [portable(frame) for frame in value] if isinstance(value, list) else portable(value)
    return {"type": part["type"], "path" if key == "path" else "url": value}


def _relative(path: str, root: Path) -> str:
    inside = Path(path).is_relative_to(os.path.abspath(root))
    return Path(path).relative_to(os.path.abspath(root)).as_posix() if inside else path
