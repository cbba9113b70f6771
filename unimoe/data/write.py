"""Samples -> a data file; the inverse of read.py."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unimoe.files import atomic_write
from unimoe.media.source import Part, frame_parts, media_bytes

from .records import COLUMNS
from .sample import Sample
from .tables import require

_COLUMN = {modality: column for column, modality in COLUMNS.items() if column.endswith("s")}


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write the samples in the format of the suffix.

    ``.parquet`` is a Hugging Face dataset and ``.tar`` a WebDataset shard, both with their media inside; any
    other is messages JSONL, in which paths inside its folder become relative.

    Raises:
        UserError: a media file cannot be read, or the disk is full.
    """
    path = Path(path)
    write = {".parquet": _parquet, ".tar": _shard}.get(path.suffix, _jsonl)
    atomic_write(path, write(samples, path.parent))


def _jsonl(samples: Iterable[Sample], root: Path) -> str:
    lines = [json.dumps(sample.to_record(root), ensure_ascii=False) for sample in samples]
    return "".join(line + "\n" for line in lines)


def _parquet(samples: Iterable[Sample], root: Path) -> bytes:
    rows = []
    for sample in samples:
        row: dict[str, Any] = {column: [] for column in _COLUMN.values()}
        for part in sample.media():
            row[_COLUMN[part["type"]]].append(_cell(part, sample.source))
        rows.append({"id": sample.id, "messages": _bare(sample, text=None), **row})
    buffer = io.BytesIO()
    require("datasets").Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


def _cell(part: Part, where: str) -> dict[str, Any]:
    """A media file as the datasets library stores it; frames are a list of such images."""
    if frames := frame_parts(part):
        return {"bytes": None, "path": None, "frames": [_cell(frame, where) for frame in frames]}
    return {"bytes": media_bytes(part, where), "path": None}


def _shard(samples: Iterable[Sample], root: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index, sample in enumerate(samples):
            record = {"messages": _bare(sample), **({} if sample.id is None else {"id": sample.id})}
            media: dict[str, Part] = {}
            videos: list[str | list[str]] = []
            for number, part in enumerate(sample.media()):
                stem = f"{index:06d}.{number}.{part['type']}"
                if frames := frame_parts(part):
                    files = {f"{stem}.{place}{_ending(frame)}": frame for place, frame in enumerate(frames)}
                    videos.append(list(files))
                else:
                    files = {f"{stem}{_ending(part)}": part}
                    videos += files if part["type"] == "video" else []
                media |= files
            if any(isinstance(video, list) for video in videos):
                record["videos"] = videos  # which images are the frames of which video
            contents = {f"{index:06d}.json": json.dumps(record, ensure_ascii=False).encode()}
            contents |= {name: media_bytes(part, sample.source) for name, part in media.items()}
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _bare(sample: Sample, **absent: None) -> list[dict[str, Any]]:
    """The messages with parts that only mark the places of media. ``absent``: keys that every part has."""

    def part(one: Part) -> Part:
        return one if one["type"] == "text" else {"type": one["type"], **absent}

    return [{**message, "content": [part(one) for one in message["content"]]} for message in sample.messages]


def _ending(part: Part) -> str:
    """Suffix of a media file's name: its own, or one that a reader takes for the same modality."""
    name = part.get("path") or getattr(part.get("stored"), "name", "")
    usual = {"image": ".png", "video": ".mp4"}.get(part["type"], ".wav")
    return (Path(name).suffix if isinstance(name, str) else "") or usual
