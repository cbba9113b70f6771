"""Data files -> Samples; write.py is the inverse.

file.json        [{...}, {...}]      record -> records.parse_record -> Sample(source="file.json[0]")
file.jsonl       {...}\\n{...}\\n                                   -> Sample(source="file.jsonl:1")
file.parquet     rows, also .arrow                                -> Sample(source="file.parquet[0]")
shard.tar        000.json 000.jpg ..., a WebDataset shard         -> Sample(source="shard.tar:000")
set-{00..09}.tar, set-*.parquet, a folder of either, a folder from Dataset.save_to_disk: several files

The format is detected from the content, as is the encoding of text (UTF-8, UTF-16, UTF-32, with or without
byte order marks).
"""

import glob
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from unimoe.errors import UserError
from unimoe.files import file_hash

from . import shards, tables
from .errors import DataError
from .records import parse_record
from .sample import Sample

T = TypeVar("T")
FORMATS = ("auto", "llava", "messages")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def read_samples(
    path: str | Path, format: str = "auto", media_root: str | Path | None = None, training: bool = True
) -> list[Sample]:
    """Read all samples of one or several files. Media are not decoded, but must exist.

    Args:
        path: what :func:`data_files` takes.
        format: "llava" (turns under "conversations"), "messages" (turns under "messages"), or "auto":
            whichever each record has. Key names may be LLaVA's, Uni-MoE's, ShareGPT's or OpenAI's (see
            records.py).
        media_root: folder that relative media paths are resolved against, by default that of the file.
        training: every sample must end in an assistant turn.

    Raises:
        UserError: a record is faulty; the message names ``file:line`` (JSON and tables: ``file[index]``;
            shards: ``file:basename``).
    """
    samples = list(stream_samples(path, format, media_root, training))
    if not samples:
        raise UserError(f"{path}: the file holds no samples")
    return samples


def spread(items: Sequence[T], most: int) -> list[T]:
    """Items, evenly spaced, at most ``most`` of them."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def stream_samples(
    path: str | Path,
    format: str = "auto",
    media_root: str | Path | None = None,
    training: bool = True,
    convert: bool = True,
) -> Iterator[Sample]:
    """Read as :func:`read_samples` does, one by one. Without ``convert``, samples of parquet files hold their
    media in memory, and nothing is written to the cache of the ``datasets`` library."""
    if format not in FORMATS:
        raise UserError(f"found the data format {format!r}, expected one of {', '.join(FORMATS)}")
    for file in data_files(path):
        root = file.parent if media_root is None else Path(media_root)
        for source, record in _raised(scan_records(file, convert)):
            yield parse_record(record, source, root, format, training)


def read_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, decoded value) of each record of one or several files.

    Raises:
        UserError: at the first fault.
    """
    for file in data_files(path):
        yield from _raised(scan_records(file))


def data_files(path: str | Path) -> list[Path]:
    """The files that ``path`` means, in order.

    ``path`` is one file, a pattern with ``{000..099}``, ``{a,b}``, ``*`` or ``?``, a folder written by
    ``datasets.Dataset.save_to_disk``, or a folder of shards or tables.

    Raises:
        UserError: a file does not exist.
    """
    files: list[Path] = []
    for name in [str(path)] if Path(path).exists() else _expand(str(path)):
        found = [name] if Path(name).exists() else sorted(glob.glob(name))
        if not found:
            raise UserError(f"there is no data file {name}")
        for entry in map(Path, found):
            files += _inside(entry) if entry.is_dir() else [entry]
    return files


def data_hashes(names: Iterable[str], quick: bool = False) -> dict[str, str]:
    """SHA-256 of every file that ``names`` mean, by path.

    ``quick`` takes size and time of change instead, for files too large to be read at every start.

    Raises:
        UserError: a file does not exist.
    """

    def stamp(file: Path) -> str:
        found = file.stat()
        return f"{found.st_size} bytes, {found.st_mtime_ns}"

    hashed = stamp if quick else file_hash
    return {str(file): hashed(file) for name in names for file in data_files(name)}


def scan_records(path: Path, convert: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield (source, decoded value or DataError) for each record of one file; a faulty record does not end
    it.

    A file of JSON that starts with ``[`` is a list, any other holds one value per line unless it is one value
    over several lines.

    Raises:
        UserError: the file cannot be read at all.
    """
    kind = file_format(path)
    if kind in ("parquet", "arrow"):
        yield from tables.table_records(path) if convert else tables.stream_table(path)
    elif kind == "tar":
        yield from shards.shard_records(path)
    else:
        yield from _json_records(path)


def line_numbers(path: Path) -> list[int]:
    """The line on which each element of a JSON list starts; an empty list for any other file."""
    if file_format(path) != "json":
        return []
    text = _read_text(path)
    if not text.lstrip().startswith("[") or not _is_json(text):
        return []
    decoder, lines, line, seen = json.JSONDecoder(), [], 1, 0
    at = text.index("[") + 1
    while match := re.compile(r"[\s,]*(?=[^\s,\]])").match(text, at):
        line += text.count("\n", seen, match.end())
        seen = match.end()
        lines.append(line)
        _, at = decoder.raw_decode(text, match.end())
    return lines


def _raised(records: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for source, record in records:
        if isinstance(record, DataError):
            raise record
        yield source, record


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    first = next((text for _, text in _lines(path) if isinstance(text, str) and text.strip()), "").lstrip()
    if first.startswith("["):
        found = _decode(_read_text(path), str(path))
        if isinstance(found, DataError):
            yield str(path), found
            return
        for index, record in enumerate(found):
            yield f"{path}[{index}]", record
    elif first.startswith("{") and path.suffix != ".jsonl" and not _is_json(first):
        yield f"{path}[0]", _decode(_read_text(path), str(path))
    else:
        for number, line in _lines(path):
            source = f"{path}:{number}"
            if isinstance(line, DataError):
                yield source, line
            elif line.strip():
                yield source, _decode(line, source, first_line=number)


def _lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """The numbered lines, one at a time: a file may exceed the memory. Byte order marks are removed, also
    those left where files were concatenated."""
    encoding = _encoding(path)
    with _text_errors(path), path.open("rb") as binary:
        if encoding != "utf-8":
            with io.TextIOWrapper(binary, encoding) as file:
                for number, line in enumerate(file, 1):
                    yield number, line.rstrip("\n").lstrip(_MARK)
            return
        for number, raw in enumerate(binary, 1):
            try:
                yield number, raw.decode().rstrip("\r\n").lstrip(_MARK)
            except UnicodeDecodeError as error:
                if number == 1:
                    raise  # no text file at all
                yield number, DataError("not JSON", f"{path}:{number}", f"not UTF-8 text ({error.reason})")


def _read_text(path: Path) -> str:
    with _text_errors(path):
        return path.read_text(encoding=_encoding(path)).lstrip(_MARK)


_MARK = "\ufeff"


def _encoding(path: Path) -> str:
    """Encoding of a text file that begins with ASCII, as JSON does: by its byte order mark or zero bytes."""
    return json.detect_encoding(_head(path, 4)).replace("utf-8-sig", "utf-8")


def file_format(path: Path) -> str:
    """``parquet``, ``arrow``, ``tar`` or ``json``, by content; by suffix where the content does not say.

    Raises:
        UserError: the file cannot be read.
    """
    head = _head(path, 512)
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:6] == b"ARROW1" or head[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    by_suffix = {".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
    return by_suffix.get(path.suffix, "json")


def _head(path: Path, size: int) -> bytes:
    with _text_errors(path), path.open("rb") as file:
        return file.read(size)


@contextmanager
def _text_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror}") from error
    except UnicodeError as error:
        expected = "expected .json, .jsonl, .parquet, .arrow or .tar, unpacked"
        reason = getattr(error, "reason", error)
        raise UserError(f"{path}: not UTF-8 or UTF-16 text ({reason}); {expected}") from error


def _decode(text: str, source: str, first_line: int = 1) -> Any:
    """The value, or the fault."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        return DataError("not JSON", source, f"not JSON: {error.msg} at line {line}, column {error.colno}")
    except RecursionError:
        return DataError("not JSON", source, "the JSON is nested too deeply")


def _is_json(text: str) -> bool:
    return not isinstance(_decode(text, ""), DataError)


def _expand(name: str) -> list[str]:
    """``a-{00..02}`` -> a-00, a-01, a-02; ``{a,b}`` -> a, b."""
    match = _BRACES.search(name)
    if match is None:
        return [name]
    first, last, words = match.groups()
    if words is None:
        if int(first) > int(last):
            raise UserError(f"{name}: {{{first}..{last}}} counts down and names no file")
        span = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        span = words.split(",")
    return [f"{name[: match.start()]}{word}{rest}" for word in span for rest in _expand(name[match.end() :])]


def _inside(folder: Path) -> list[Path]:
    """The files of a folder: those of a saved ``datasets.Dataset`` in order, otherwise all shards or
    tables."""
    state = folder / "state.json"
    if state.is_file():
        content = json.loads(state.read_text(encoding="utf-8"))
        return [folder / entry["filename"] for entry in content.get("_data_files", [])]
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; name one of them: {folder}/SPLIT")
    files = sorted(file for file in folder.iterdir() if file.suffix in (*tables.SUFFIXES, ".tar"))
    if not files:
        raise UserError(f"cannot read the data file {folder}: it is a folder without shards or tables")
    return files
