"""``unimoe evaluate``: a model's answers to a file of questions, scored by the metrics of its task.

    questions (conversations whose last turn is the answer, or items with "text" and "answer")
      -> batches of similar length -> greedy answers, appended to OUTPUT/predictions.jsonl
      -> OUTPUT/scores.json: the task's metrics over all questions and by their modalities

==================  ===========================================================================
task                metrics
==================  ===========================================================================
``vqa``             accuracy over annotators (Antol et al., 2015; any one of fewer than four), exact match
``choice``          accuracy of the chosen letter or option
``classification``  exact match; ``known``: the answer contains the right name and no other
``caption``         CIDEr-D (pycocoevalcap), ROUGE-L
``asr``             word and character error rate (jiwer) over all recordings, lower-cased, no punctuation,
                    against the nearest of several transcripts
==================  ===========================================================================
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from transformers.utils.logging import disable_progress_bar

from unimoe.artifacts import STAGE_FILE
from unimoe.compress.decoding import Decoding
from unimoe.data import Collator
from unimoe.data.read import data_hashes
from unimoe.errors import UserError
from unimoe.files import atomic_write, file_hash
from unimoe.inference.engines import AnsweringModel, Engine, GGUFType, check_decoding, load_engine
from unimoe.inference.generate import ask_all
from unimoe.model.loading import find_any
from unimoe.model.processing import UniMoeProcessor

from .normalize import caption_tokens
from .questions import Question, read_questions
from .scorers import grade_all, scorer

log = logging.getLogger(__name__)

Answers = dict[str, str]
"""The model's answers by id of the question."""
Over = Callable[[Sequence[Question]], dict[str, float]]
"""Means over a group of questions."""
Metric = Callable[[Sequence[Question], Answers], Over]
"""Grades all questions at once: word frequencies and names of other classes come from the whole file."""


def evaluate(
    model: str,
    data: str,
    /,
    *,
    task: Literal["vqa", "choice", "classification", "caption", "asr"],
    output: str = "runs/evaluation",
    media_root: str | None = None,
    limit: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    contrast: float = 0.0,
    rewire: int = 0,
    experts: int = 0,
    skip: str = "",
    engine: Engine = "torch",
    type: GGUFType | None = None,
    gguf: Path | None = None,
) -> int:
    """Ask a model every question of a file and score its answers.

    The same command resumes an interrupted run. A question whose media cannot be read is reported and not
    scored, and the rest is; the exit status is then 1.

    Args:
        model: folder of a finished stage (or a hub id of a unimoe model).
        data: questions as JSON or JSONL; "answers" and "options" of an item are read where a task has them.
        task: how answers are scored.
        output: folder for predictions.jsonl and scores.json.
        media_root: folder that the data's paths are relative to (default: the data's own).
        limit: number of questions, from the first; 0 asks all.
        batch_size: questions per batch; affects the answers only through rounding.
        max_new_tokens: maximum length of an answer.
        contrast: strength of the contrast with the model's own worse experts (SCMoE), such as 0.5.
        rewire: steps that shift the routers towards each question (Rewiring), such as 5.
        experts: experts of a token, fewer than the router chooses.
        skip: weights below which experts are skipped, by modality, such as image=0.5,text=0.2.
        engine: torch; or llama.cpp, which decodes faster and in less memory.
        type: weights of llama.cpp: q8_0, f16 or f32 (default: q8_0).
        gguf: file of `unimoe export gguf` for llama.cpp (default: made on first use, in the cache).

    Returns:
        0, or 1 if a question could not be asked.

    Raises:
        UserError: for wrong settings, a file that is broken as a whole, or when no question can be asked.
    """
    for name, value, least in (
        ("limit", limit, 0),
        ("batch-size", batch_size, 1),
        ("max-new-tokens", max_new_tokens, 1),
    ):
        if value < least:
            raise UserError(f"--{name} is {value}, expected at least {least}")
    metrics = METRICS[task]()
    failed: dict[str, str] = {}

    def leave_out(name: str, error: UserError) -> None:
        failed[name] = str(error)
        log.warning("%s", error)

    decoding = Decoding.from_flags(contrast, rewire, experts, skip)
    questions = read_questions(data, media_root, leave_out)[: limit or None]
    if not questions:
        raise UserError(f"{data}: no question can be asked; the first: {next(iter(failed.values()))}")
    _check_answers(task, questions)
    find_any(model)
    identity = {
        "model": _identity(model),
        "data": list(data_hashes([data]).values()),
        "media_root": media_root,
        "max_new_tokens": max_new_tokens,
    }
    if engine != "torch":
        identity["engine"] = f"{engine} {file_hash(gguf) if gguf and gguf.is_file() else type or 'q8_0'}"
    if not decoding.plain:
        identity["decoding"] = asdict(decoding)
    load = partial(load_engine, model, engine, type, gguf, batch_size)
    answers = _ask(load, questions, Path(output), identity, batch_size, max_new_tokens, leave_out, decoding)
    if not answers:
        raise UserError(f"{data}: no question can be asked; the first: {next(iter(failed.values()))}")
    questions = [question for question in questions if question.id not in failed]
    scores = {"task": task, "model": model, "data": data, "scorers": scorer(RULES[task]).version}
    scores |= {**score(metrics, questions, answers), "failed": failed}
    atomic_write(Path(output) / "scores.json", json.dumps(scores, indent=1) + "\n")
    for kind, found in {"all": scores["all"], **scores["by_media"]}.items():
        values = "  ".join(f"{name} {value:.4f}" for name, value in found.items() if name != "count")
        print(f"{kind:<16}{found['count']:>7} questions  {values}")
    if failed:
        log.warning(
            "%d of %d questions could not be asked and are not scored",
            len(failed),
            len(failed) + len(questions),
        )
    return int(bool(failed))


def score(metrics: Metric, questions: Sequence[Question], answers: Answers) -> dict[str, Any]:
    """``all`` and ``by_media`` (``image``, ``image+speech``, ...): the metrics and ``count``."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.sample.modality, []).append(question)
    over = metrics(questions, answers)
    found = {kind: {"count": len(group), **over(group)} for kind, group in sorted(groups.items())}
    return {"all": {"count": len(questions), **over(questions)}, "by_media": found}


# -------------------------------------------------------------------- asking


def _ask(
    load: Callable[[], tuple[AnsweringModel, UniMoeProcessor]],
    questions: Sequence[Question],
    folder: Path,
    identity: dict[str, Any],
    batch_size: int,
    max_new_tokens: int,
    skip: Callable[[str, UserError], object],
    decoding: Decoding,
) -> Answers:
    """Answers by id of the question; those in the folder are not asked again."""
    path = folder / "predictions.jsonl"
    answers = _read(path, identity)
    left = [question for question in questions if question.id not in answers]
    if answers:
        print(f"{len(questions) - len(left)} of {len(questions)} questions were answered before")
    if not left:
        return answers
    disable_progress_bar()
    loaded, processor = load()
    check_decoding(loaded, decoding)
    if not answers:
        atomic_write(path, json.dumps(identity) + "\n")
    collator, done = Collator(processor), 0
    with path.open("a", encoding="utf-8") as file:
        samples = [question.sample for question in left]

        def skip_one(index: int, error: UserError) -> None:
            skip(left[index].id, error)

        how = {"skip": skip_one, "decoding": decoding}
        for batch in ask_all(loaded, collator, samples, batch_size, max_new_tokens, **how):
            for index, said in batch.items():
                question = left[index]
                answers[question.id] = said
                row = {"id": question.id, "said": said, "right": list(question.truth.answers)}
                file.write(json.dumps({**row, "media": question.sample.modality}) + "\n")
            file.flush()
            done += len(batch)
            print(f"{done} of {len(left)} questions", flush=True)
    return answers


def _read(path: Path, identity: dict[str, Any]) -> Answers:
    """The answers in a file of predictions. An incomplete last line is dropped from the file.

    Raises:
        UserError: if they are another model's, or answers to other questions.
    """
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    try:
        found, *rows = (json.loads(line) for line in whole.splitlines())
        answers = {row["id"]: row["said"] for row in rows}
        different = [key for key in identity | found if found.get(key) != identity.get(key)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no predictions ({error}); choose another --output") from error
    if different:
        raise UserError(
            f"{path} was made with another {different[0]}; choose another --output or delete the file"
        )
    if whole != text:
        atomic_write(path, whole)
    return answers


def _identity(model: str) -> str:
    """A hash of a folder's weights and settings, or the hub id."""
    made = sorted(path for kind in ("safetensors", "json", "jinja") for path in Path(model).glob(f"*.{kind}"))
    return "+".join(file_hash(path) for path in made if path.name != STAGE_FILE) or model


def _check_answers(task: str, questions: Sequence[Question]) -> None:
    rule = scorer(RULES[task])
    for question in questions:
        reason = rule.fits(question.truth)
        if task == "asr" and not any(map(str.isalnum, "".join(question.truth.answers))):
            reason = "the transcript holds no word"
        if reason:
            raise UserError(f"{question.sample.source}: {reason}, which --task {task} cannot score")


# -------------------------------------------------------------------- metrics


def _graded(*names: str) -> Metric:
    """Mean grades of the named scorers; ``known`` is the lenient grade of ``exact``."""

    def metrics(questions: Sequence[Question], answers: Answers) -> Over:
        said = {question.id: answers[question.id] for question in questions}
        truths = {question.id: question.truth for question in questions}
        found: dict[str, dict[str, float]] = {}
        for name in names:
            rule = "exact" if name == "known" else name
            grades = grade_all(scorer(rule), said, truths, "evaluate").items()
            found[name] = {id: grade.known if name == "known" else grade.score for id, grade in grades}
        return _means(found)

    return metrics


def _means(grades: dict[str, dict[str, float]]) -> Over:
    """Means of ``grades``, which are by name of the metric and id of the question."""
    return lambda group: {name: fmean(of[question.id] for question in group) for name, of in grades.items()}


def _caption() -> Metric:
    cider, rouge = _package("pycocoevalcap.cider.cider").Cider(), _graded("rouge")

    def metrics(questions: Sequence[Question], answers: Answers) -> Over:
        # our own tokens instead of the Penn Treebank's, which would need Java
        right = {q.id: [" ".join(caption_tokens(answer)) for answer in q.truth.answers] for q in questions}
        said = {q.id: [" ".join(caption_tokens(answers[q.id]))] for q in questions}
        scores = cider.compute_score(right, said)[1]
        ciders = _means({"CIDEr": dict(zip(right, map(float, scores), strict=True))})
        rouges = rouge(questions, answers)
        return lambda group: {**ciders(group), **rouges(group)}

    return metrics


def _asr() -> Metric:
    jiwer = _package("jiwer")
    plain = jiwer.Compose(
        [jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()]
    )

    def metrics(questions: Sequence[Question], answers: Answers) -> Over:
        said_of = {question.id: plain(answers[question.id]) for question in questions}
        right_of = {}
        for question in questions:
            errors = {
                text: jiwer.wer(text, said_of[question.id])
                for text in map(plain, question.truth.answers)
                if text
            }
            right_of[question.id] = min(errors, key=errors.__getitem__)

        def over(group: Sequence[Question]) -> dict[str, float]:
            right, said = ([of[question.id] for question in group] for of in (right_of, said_of))
            return {"WER": jiwer.wer(right, said), "CER": jiwer.cer(right, said)}

        return over

    return metrics


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"this task needs {package}: pip install 'unimoe[evaluate]' ({error})") from error


METRICS: dict[str, Callable[[], Metric]] = {
    "vqa": lambda: _graded("vqa", "exact"),
    "choice": lambda: _graded("choice"),
    "classification": lambda: _graded("exact", "known"),
    "caption": _caption,
    "asr": _asr,
}
RULES = {"vqa": "vqa", "choice": "choice", "classification": "exact", "caption": "rouge", "asr": "exact"}
"""The scorer that checks whether a reference suits the task."""
