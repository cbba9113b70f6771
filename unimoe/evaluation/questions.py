"""Test files: conversations or the published benchmarks' items -> questions with what is right about them.

LLaVA or messages records    the last assistant turn is the answer
items of CoIN, UCIT, ...     {"question_id", "image", "text", "answer"}; any column of media, "question" for
                             "text", "answers" for "answer", which may be a list, "options" of a choice;
                             CoIN's "answer_bbox" is the answer where it is there, [x1, y1, x2, y2] of 0 to 1
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from unimoe.data import Sample, parse_record
from unimoe.data.read import data_files, read_records
from unimoe.data.records import COLUMNS
from unimoe.errors import UserError

from .scorers import Truth


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its answer."""

    id: str
    """Unique in its file; grades are matched by it."""
    sample: Sample
    """The turns before the answer."""
    truth: Truth


def read_questions(path: str | Path, media_root: str | Path | None = None) -> list[Question]:
    """Every question of a file, or files (what :func:`data_files` takes).

    Raises UserError naming file and line: for a broken record, for an answer that is missing, or when two
    questions share an id.
    """
    questions: dict[str, Question] = {}
    for file in data_files(path):
        root = file.parent if media_root is None else Path(media_root)
        for source, record in read_records(file):
            question = _question(record, source, root)
            if question.id in questions:
                raise UserError(
                    f"{source}: the id {question.id!r} is that of {questions[question.id].sample.source}"
                )
            questions[question.id] = question
    if not questions:
        raise UserError(f"{path}: the file holds no questions")
    return list(questions.values())


def _question(record: Any, source: str, root: Path) -> Question:
    if not isinstance(record, Mapping):
        raise UserError(f"{source}: expected an object, found {type(record).__name__}")
    record = {key: value for key, value in record.items() if value is not None}
    if "answer_bbox" in record:
        record["answer"] = str(record["answer_bbox"])  # a list as it is written
    name = str(record.get("question_id", record.get("id", source)))
    if "conversations" in record or "messages" in record:
        sample = parse_record(record, source, root)
        sample, answer = sample.split_answer()
    else:
        text, answer = record.get("text", record.get("question")), record.get("answer")
        if not isinstance(text, str) or not {"answer", "answers"} & record.keys():
            raise UserError(
                f'{source}: expected turns, or the keys "text" and "answer"; found {sorted(record)}'
            )
        sample = parse_record(_as_conversation(record, text), source, root, training=False)
    truth = Truth(_answers(record.get("answers") or answer, source), _options(record, source))
    return Question(name, sample, truth)


def _answers(found: Any, source: str) -> tuple[str, ...]:
    """One or several, or VQAv2's objects that hold one each."""
    several = found if isinstance(found, list) else [found]
    texts = [one.get("answer") if isinstance(one, Mapping) else one for one in several]
    if not texts or not all(isinstance(text, (str, int, float)) for text in texts):
        raise UserError(f"{source}: expected an answer or a list of answers, found {found!r}")
    return tuple(str(text).strip() for text in texts)


def _options(record: Mapping[str, Any], source: str) -> dict[str, str]:
    """Letter -> text; a list is lettered in its order."""
    found = record.get("options") or {}
    if isinstance(found, list):
        found = dict(zip(ascii_uppercase, found, strict=False))
    if not isinstance(found, Mapping):
        raise UserError(f'{source}: expected "options" as a list or by letter, found {found!r}')
    return {str(letter).strip("(). ").upper(): str(text) for letter, text in found.items()}


def _as_conversation(record: Mapping[str, Any], text: str) -> dict[str, Any]:
    """An item of a test file as a LLaVA record; its text may lack the placeholders of its media."""
    media = {column: record[column] for column in COLUMNS if record.get(column) is not None}
    missing = ""
    for kind in dict.fromkeys(COLUMNS[column] for column in media):
        given = [
            len(value) if isinstance(value, list) and column != "video" else 1  # of a video these are frames
            for column, value in media.items()
            if COLUMNS[column] == kind
        ]
        heard_as_audio = kind == "speech" and not {"audio", "audios"} & media.keys()
        named = text.count(f"<{kind}>") + (text.count("<audio>") if heard_as_audio else 0)
        missing += f"<{kind}>\n" * (sum(given) - named)
    return {**media, "conversations": [{"from": "human", "value": missing + text}]}
