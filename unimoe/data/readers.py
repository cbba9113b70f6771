"""Data files -> list of Samples, and back.

    file.json    [{...}, {...}]      each record -> records.parse_record -> Sample(source="file.json[0]")
    file.jsonl   {...}\\n{...}\\n                                          -> Sample(source="file.jsonl:1")
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unimoe.errors import UserError
from unimoe.files import atomic_write

from .records import parse_record
from .sample import Sample

FORMATS = ("auto", "llava", "messages")


def read_samples(
    path: str | Path, format: str = "auto", media_root: str | Path | None = None, training: bool = True
) -> list[Sample]:
    """Read every sample of a JSON list or JSONL file; no medium is decoded, but every file must exist.

    ``format`` is "llava" (turns under "conversations"), "messages" (turns under "messages"), or "auto":
    whichever each record has. Key names may be LLaVA's, Uni-MoE's, ShareGPT's or OpenAI's in either (see
    records.py). Relative media paths are taken from ``media_root``, by default the folder of the file. With
    ``training`` every sample must end in an assistant turn. Raises UserError naming ``file:line`` (JSON:
    ``file[index]``).
    """
    path = Path(path)
    if format not in FORMATS:
        raise UserError(f"found the data format {format!r}, expected one of {', '.join(FORMATS)}")
    root = path.parent if media_root is None else Path(media_root)
    samples = [parse_record(record, source, root, format, training) for source, record in read_records(path)]
    if not samples:
        raise UserError(f"{path}: the file holds no samples")
    return samples


def read_records(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (source, decoded JSON value) for each record of a JSON list, one JSON object, or a JSONL file.

    The kind is told from the content: a file that begins with ``[`` is a list, any other holds one value a
    line unless it is one value over several lines. Raises UserError when it is not UTF-8 or not JSON.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"there is no data file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    lines = text.split("\n")  # not splitlines(): JSON strings may hold other line separators
    start = text.lstrip()
    if start.startswith("["):
        for index, record in enumerate(_decode(text, str(path))):
            yield f"{path}[{index}]", record
    elif start.startswith("{") and path.suffix != ".jsonl" and not _is_json(next(filter(str.strip, lines))):
        yield f"{path}[0]", _decode(text, str(path))
    else:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", _decode(line, f"{path}:{number}", first_line=number)


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write messages JSONL that ``read_samples`` reads back; paths inside its folder become relative."""
    root = Path(path).parent
    lines = [json.dumps(sample.to_record(root), ensure_ascii=False) for sample in samples]
    atomic_write(path, "".join(line + "\n" for line in lines))


def _decode(text: str, source: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        raise UserError(f"{source}: not JSON: {error.msg} at line {line}, column {error.colno}") from error
    except RecursionError as error:
        raise UserError(f"{source}: the JSON is nested too deeply") from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
