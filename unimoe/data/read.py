"""Data files -> list of Samples; writers.py has the way back.

file.json        [{...}, {...}]      record -> records.parse_record -> Sample(source="file.json[0]")
file.jsonl       {...}\\n{...}\\n                                   -> Sample(source="file.jsonl:1")
file.parquet     rows, also .arrow                                -> Sample(source="file.parquet[0]")
shard.tar        000.json 000.jpg ..., a WebDataset shard         -> Sample(source="shard.tar:000")
set-{00..09}.tar, set-*.parquet, a folder of either, a folder from Dataset.save_to_disk: several files
"""

import glob
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unimoe.errors import UserError
from unimoe.files import file_hash

from . import shards, tables
from .errors import DataError
from .records import parse_record
from .sample import Sample

FORMATS = ("auto", "llava", "messages")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def read_samples(
    path: str | Path, format: str = "auto", media_root: str | Path | None = None, training: bool = True
) -> list[Sample]:
    """Read every sample of a file, or files; no medium is decoded, but every one must exist.

    ``path`` is what :func:`data_files` takes. ``format`` is "llava" (turns under "conversations"), "messages"
    (turns under "messages"), or "auto": whichever each record has. Key names may be LLaVA's, Uni-MoE's,
    ShareGPT's or OpenAI's in either (see records.py). Relative media paths are taken from ``media_root``, by
    default the folder of the file. With ``training`` every sample must end in an assistant turn. Raises
    UserError naming ``file:line`` (JSON and tables: ``file[index]``; shards: ``file:basename``).
    """
    samples = list(stream_samples(path, format, media_root, training))
    if not samples:
        raise UserError(f"{path}: the file holds no samples")
    return samples


def stream_samples(
    path: str | Path,
    format: str = "auto",
    media_root: str | Path | None = None,
    training: bool = True,
    convert: bool = True,
) -> Iterator[Sample]:
    """As :func:`read_samples`, one by one. Without ``convert`` the samples of parquet files hold their media,
    and nothing is written to the cache of the ``datasets`` library."""
    if format not in FORMATS:
        raise UserError(f"found the data format {format!r}, expected one of {', '.join(FORMATS)}")
    for file in data_files(path):
        root = file.parent if media_root is None else Path(media_root)
        for source, record in _raised(scan_records(file, convert)):
            yield parse_record(record, source, root, format, training)


def read_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, decoded value) of each record of a file or files. UserError at the first fault."""
    for file in data_files(path):
        yield from _raised(scan_records(file))


def data_files(path: str | Path) -> list[Path]:
    """The files that ``path`` means, in order.

    It is one file, a name with ``{000..099}``, ``{a,b}``, ``*`` or ``?``, a folder that
    ``datasets.Dataset.save_to_disk`` wrote, or a folder of shards or tables. Raises UserError when one is not
    there.
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
    """SHA-256 of every file that ``names`` mean, by path. Raises UserError when one is not there.

    ``quick`` takes the size and the time of the last change instead: of files too large to be read at every
    start.
    """

    def stamp(file: Path) -> str:
        found = file.stat()
        return f"{found.st_size} bytes, {found.st_mtime_ns}"

    hashed = stamp if quick else file_hash
    return {str(file): hashed(file) for name in names for file in data_files(name)}


def scan_records(path: Path, convert: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield (source, decoded value or DataError) for each record of one file: faults do not end it.

    JSON is told from the content: a file that begins with ``[`` is a list, any other holds one value a line
    unless it is one value over several lines. Raises UserError when the file cannot be read at all.
    """
    if path.suffix in tables.SUFFIXES:
        yield from tables.table_records(path) if convert else tables.stream_table(path)
    elif path.suffix == ".tar":
        yield from shards.shard_records(path)
    else:
        yield from _json_records(path)


def line_numbers(path: Path) -> list[int]:
    """The line on which each element of a JSON list begins; nothing for any other file."""
    if path.suffix in (*tables.SUFFIXES, ".tar"):
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
    first = next(filter(str.strip, _lines(path)), "").lstrip()
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
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield f"{path}:{number}", _decode(line, f"{path}:{number}", first_line=number)


def _lines(path: Path) -> Iterator[str]:
    """One after the other: a file may be larger than the memory."""
    with _text_errors(path), path.open(encoding="utf-8-sig") as file:
        yield from (line.rstrip("\n") for line in file)


def _read_text(path: Path) -> str:
    with _text_errors(path):
        return path.read_text(encoding="utf-8-sig")


@contextmanager
def _text_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        expected = "expected .json, .jsonl, .parquet, .arrow or .tar, unpacked"
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); {expected}") from error


def _decode(text: str, source: str, first_line: int = 1) -> Any:
    """The value, or what is wrong with it."""
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
    """The files of a folder: those of a saved ``datasets.Dataset`` in order, else all shards or tables."""
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
