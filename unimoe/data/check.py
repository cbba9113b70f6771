"""Find every fault in a file of conversations."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimoe.errors import UserError, first_line
from unimoe.files import fingerprint
from unimoe.media.audio import check_audio
from unimoe.media.image import load_image
from unimoe.media.source import Part, frame_parts, media_bytes, open_media
from unimoe.media.video import load_video

from .errors import DataError, Fault
from .read import data_files, line_numbers, scan_records
from .records import parse_record
from .sample import Sample

_DECODE: dict[str, Callable[[Part, str], Any]] = {
    "image": load_image,
    "video": load_video,
    "speech": check_audio,
    "audio": check_audio,
}


@dataclass
class ConversationReport:
    """Contents and faults of a file of conversations."""

    samples: int = 0
    """Records, faulty ones included."""
    turns: int = 0
    modalities: Counter[str] = field(default_factory=Counter)
    """Samples by modality."""
    media: Counter[str] = field(default_factory=Counter)
    """Images, videos, clips by modality."""
    tokens: dict[str, int] | None = None
    """Percentiles of the samples' lengths in tokens, and their sum, if requested."""
    faults: list[Fault] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "faults": [asdict(fault) for fault in self.faults]}


def check_conversations(
    path: str | Path,
    media_root: str | Path | None = None,
    decode: bool = True,
    training: bool = True,
    length: Callable[[Sample], int] | None = None,
    max_length: int | None = None,
) -> ConversationReport:
    """Read every record and collect all faults: the first one of each record, and those of its media.

    Args:
        path: as :func:`data_files` takes it.
        media_root: folder that relative paths are resolved against, by default that of the file.
        decode: also decode all media.
        training: each sample must end in an answer.
        length: the tokens of a sample; a UserError it raises counts as the sample's fault.
        max_length: the most tokens a sample may have.

    Raises:
        UserError: there is no such file.
    """
    report, media, first_of, lengths = ConversationReport(), _Media(decode), dict[str, str](), []
    for file in data_files(path):
        root = file.parent if media_root is None else media_root
        for source, where, record in _records(file):
            try:
                report.samples += not (isinstance(record, DataError) and record.kind == "truncated")
                if isinstance(record, DataError):
                    raise record
                sample = parse_record(record, source, root, training=training)
            except DataError as error:
                report.faults.append(Fault(error.kind, where, error.message))
                continue
            except Exception as error:  # noqa: BLE001  (a record nobody thought of; the others are checked)
                report.faults.append(Fault("malformed", where, _reason(error, source)))
                continue
            report.turns += len(sample.messages)
            report.modalities[sample.modality] += 1
            report.media.update(part["type"] for part in sample.media())
            faults = [Fault(kind, where, message) for kind, message in media.faults(sample)]
            if not faults:
                first = first_of.setdefault(_signature(sample), where)
                if first != where:
                    faults.append(Fault("duplicate", where, f"the sample is the same as {first}"))
            if length and not faults:
                faults += _too_long(sample, where, length, max_length, lengths)
            report.faults += faults
    if not report.samples and not report.faults:
        report.faults.append(Fault("no samples", str(path), "found no samples, expected at least one"))
    if lengths:
        names = {"shortest": 0, "median": 50, "90 %": 90, "99 %": 99, "longest": 100}
        report.tokens = {name: int(np.percentile(lengths, share)) for name, share in names.items()}
        report.tokens["sum"] = sum(lengths)
    return report


def _records(file: Path) -> Iterator[tuple[str, str, Any]]:
    """The source of each record, its place for a reader (with the line), and its value or fault."""
    try:
        lines = line_numbers(file)
        for index, (source, record) in enumerate(scan_records(file)):
            yield source, f"{source} (line {lines[index]})" if lines else source, record
    except Exception as error:  # noqa: BLE001  (this file cannot be read; the others are)
        yield str(file), str(file), DataError("truncated", str(file), _reason(error, str(file)))


def _too_long(
    sample: Sample, where: str, length: Callable[[Sample], int], most: int | None, lengths: list[int]
) -> list[Fault]:
    try:
        lengths.append(length(sample))
    except Exception as error:  # noqa: BLE001  (whatever is wrong with one sample, the others are checked)
        return [Fault("not for the model", where, _reason(error, sample.source))]
    if most is not None and lengths[-1] > most:
        return [Fault("too long", where, f"found {lengths[-1]} tokens, expected at most {most}")]
    return []


class _Media:
    """Reads and decodes media, each file only once."""

    def __init__(self, decode: bool) -> None:
        self.decode = decode
        self.known: dict[str, tuple[str, str] | None] = {}

    def faults(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """Kind and message of each fault in the media of a sample."""
        for part in sample.media():
            name = f"{part['type']} {part['path']}" if "path" in part else ""
            if name not in self.known or not name:
                self.known[name] = self._fault(part, sample.source)
            found = self.known[name]
            if found:
                yield found

    def _fault(self, part: Part, where: str) -> tuple[str, str] | None:
        kind = "data URL" if "url" in part else "empty file"
        try:
            for file in frame_parts(part) or [part]:
                open_media(file, where).close()
            kind = "undecodable"
            if self.decode:
                _DECODE[part["type"]](part, where)
        except Exception as error:  # noqa: BLE001  (whatever is wrong with one file, the others are checked)
            return kind, _reason(error, where)
        return None


def _reason(error: Exception, where: str) -> str:
    if isinstance(error, UserError):
        return str(error).removeprefix(f"{where}: ")
    return f"{type(error).__name__}: {first_line(error)}"


def _signature(sample: Sample) -> str:
    """Equal for samples with the same text and media."""

    def content(part: Part) -> Any:
        if "stored" in part or "bytes" in part:
            return fingerprint(media_bytes(part, sample.source))
        return part

    turns = [(turn["role"], [content(part) for part in turn["content"]]) for turn in sample.messages]
    return fingerprint(json.dumps(turns, sort_keys=True))
