"""Test files: conversations or the published benchmarks' items -> questions with what is right about them.

LLaVA or messages records    the last assistant turn is the answer
CoIN, UCIT, MLLM-CL items    {"question_id", "image", "text", "answer"}; the answer may be a list
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unimoe.data import Sample, parse_record
from unimoe.data.readers import read_records
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
    """Every question of a JSON list or JSONL file.

    Raises UserError naming file and line: for a broken record, for an answer that is missing, or when two
    questions share an id.
    """
    root = Path(path).parent if media_root is None else Path(media_root)
    questions: dict[str, Question] = {}
    for source, record in read_records(path):
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
    name = str(record.get("question_id", record.get("id", source)))
    if "conversations" in record or "messages" in record:
        sample = parse_record(record, source, root)
        sample, answer = sample.split_answer()
        found: Any = record.get("answers", answer)
    else:
        text = record.get("text", record.get("question"))
        if not isinstance(text, str) or "answer" not in record:
            raise UserError(
                f'{source}: expected turns, or the keys "text" and "answer"; found {sorted(record)}'
            )
        found = record["answer"]
        sample = parse_record(_as_conversation(record, text), source, root, training=False)
    found = found if isinstance(found, list) else [found]
    if not found or None in found:
        raise UserError(f"{source}: expected an answer or a list of answers, found {found}")
    options = record.get("options") or {}
    if not isinstance(options, Mapping):
        raise UserError(f'{source}: expected "options" of letter -> text, found {options}')
    return Question(name, sample, Truth(tuple(str(answer).strip() for answer in found), dict(options)))


def _as_conversation(record: Mapping[str, Any], text: str) -> dict[str, Any]:
    """An item of CoIN's test files as a LLaVA record; its text may lack the placeholder of the picture."""
    images = record.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    missing = len(images) - text.count("<image>")
    return {"image": images, "conversations": [{"from": "human", "value": "<image>\n" * missing + text}]}
