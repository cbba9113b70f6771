"""Test files: conversations or the items of published benchmarks -> questions with their references.

LLaVA or messages records    the last assistant turn is the answer
items of CoIN, UCIT, ...     {"question_id", "image", "text", "answer"}; any media column, "question" for
                             "text", "answers" for "answer", which may be a list, "options" of a choice;
                             CoIN's "answer_bbox", if present, is the answer: [x1, y1, x2, y2] from 0 to 1
"""

from collections.abc import Callable, Mapping
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
    """A conversation up to the answer, and its reference."""

    id: str
    """Unique in its file; answers are matched to questions by it."""
    sample: Sample
    """The turns before the answer."""
    truth: Truth


def read_questions(
    path: str | Path,
    media_root: str | Path | None = None,
    skip: Callable[[str, UserError], object] | None = None,
) -> list[Question]:
    """Every question of a file, or of several files (what :func:`data_files` takes).

    Args:
        path: the file or files.
        media_root: folder that relative media paths start from (default: that of each file).
        skip: called with the source and the error of a record that cannot be used, which is then left out;
            without it the error is raised.

    Raises:
        UserError: with file and line, for a broken record, a missing media file or answer, or two questions
            with the same id.
    """
    skipped = False
    questions: dict[str, Question] = {}
    for file in data_files(path):
        root = file.parent if media_root is None else Path(media_root)
        for source, record in read_records(file):
            try:
                question = _question(record, source, root)
            except UserError as error:
                if skip is None:
                    raise
                skip(source, error)
                skipped = True
                continue
            if question.id in questions:
                raise UserError(
                    f"{source}: the id {question.id!r} is that of {questions[question.id].sample.source}"
                )
            questions[question.id] = question
    if not questions and not skipped:
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
    """An item of a test file as a LLaVA record; placeholders that its text lacks are added."""
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
