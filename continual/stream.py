"""Streams of experiences: tasks in the order of training.

stream:
  media_root: data/coin
  tasks:
    - {name: ScienceQA, train: ScienceQA/train.json, test: ScienceQA/test.json, scorer: choice, steps: 100}
    - ...
"""

import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from unimoe.data import Sample, read_samples
from unimoe.errors import UserError
from unimoe.evaluation.questions import Question, read_questions
from unimoe.evaluation.scorers import scorer
from unimoe.files import file_hash


@dataclass
class TaskConfig:
    """One task of a stream."""

    name: str
    """Name in reports; unique in the stream."""
    train: str
    """File of training samples: LLaVA JSON, messages JSON or JSONL."""
    test: str
    """File of questions: the same formats, or the test items of CoIN, UCIT and MLLM-CL."""
    scorer: str = "exact"
    """Name of the scorer, a key of :data:`unimoe.evaluation.scorers.SCORERS`."""
    prompt: str = "{question}"
    """Template around each user text, in training and test."""
    steps: int | None = None
    """Optimizer steps; None derives them from ``epochs``."""
    epochs: float = 1.0
    """Passes over the training samples, unless ``steps`` is given."""
    max_new_tokens: int = 12
    """Maximum length of an answer in tokens."""
    train_limit: int | None = None
    """Use at most this many training samples, drawn with the stream's seed."""
    test_limit: int | None = None
    """Use at most this many questions, drawn with the stream's seed."""


@dataclass
class StreamConfig:
    """Tasks, their order, and where their files are."""

    tasks: list[TaskConfig] = field(default_factory=list)
    """Tasks in the order of training."""
    root: str | None = None
    """Folder that the tasks' files are relative to (default: the working directory)."""
    media_root: str | None = None
    """Folder that media paths are relative to (default: that of each task's file)."""
    order: list[str] | None = None
    """Names of the tasks in another order, or of some of them."""
    seed: int = 0
    """Seed of the draws of ``train_limit`` and ``test_limit``; the same for every run of a comparison."""


@dataclass(frozen=True)
class Experience:
    """One task with its data."""

    index: int
    """Position in the stream, from 0."""
    config: TaskConfig
    samples: list[Sample]
    questions: list[Question]

    @property
    def name(self) -> str:
        return self.config.name

    def steps(self, batch_size: int) -> int:
        """Number of optimizer steps with batches of ``batch_size`` samples."""
        return self.config.steps or math.ceil(self.config.epochs * len(self.samples) / batch_size)


class Stream:
    """The experiences of a run; all files are read and checked, no media are decoded."""

    def __init__(self, config: StreamConfig):
        """
        Raises:
            UserError: for a task without samples, a name that occurs twice, or a scorer that does not fit.
        """
        self.config = config
        chosen = _ordered(config)
        named = [file for task in chosen for file in (task.train, task.test)]
        self.files = {file: _hash(_path(config, file)) for file in named}
        self.experiences = [_read(config, task, index) for index, task in enumerate(chosen)]

    def __len__(self) -> int:
        return len(self.experiences)

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    def __getitem__(self, index: int) -> Experience:
        return self.experiences[index]

    @property
    def names(self) -> list[str]:
        return [experience.name for experience in self.experiences]

    def samples(self) -> Iterator[Sample]:
        """All training and test conversations."""
        for experience in self.experiences:
            yield from experience.samples
            yield from (question.sample for question in experience.questions)

    def identity(self) -> dict[str, Any]:
        """What must be unchanged for a run to resume: tasks, order, contents of files, scorers."""
        return {
            "tasks": [asdict(experience.config) for experience in self.experiences],
            "seed": self.config.seed,
            "content": self.files,
            "scorers": max(scorer(experience.config.scorer).version for experience in self.experiences),
        }


def _ordered(config: StreamConfig) -> list[TaskConfig]:
    if not config.tasks:
        raise UserError("stream.tasks is empty; expected at least one task")
    by_name: dict[str, TaskConfig] = {}
    for task in config.tasks:
        if task.name in by_name:
            raise UserError(f"stream.tasks: two tasks are named {task.name!r}")
        if "/" in task.name or not task.name.strip():
            raise UserError(f"stream.tasks: {task.name!r} cannot name a task (it names a folder too)")
        by_name[task.name] = task
    order = list(by_name) if config.order is None else config.order
    if not order:
        raise UserError("stream.order is empty; expected names of tasks")
    for name in order:
        if name not in by_name:
            raise UserError(f"stream.order names {name!r}; the tasks are {', '.join(by_name)}")
    if len(set(order)) < len(order):
        raise UserError(f"stream.order names a task twice: {', '.join(order)}")
    return [by_name[name] for name in order]


def _read(config: StreamConfig, task: TaskConfig, index: int) -> Experience:
    if (task.steps is not None and task.steps < 1) or task.epochs <= 0 or task.max_new_tokens < 1:
        raise UserError(f"task {task.name!r}: steps, epochs and max_new_tokens must be above 0")
    if "{question}" not in task.prompt:
        raise UserError(f"task {task.name!r}: its prompt has no {{question}}: {task.prompt!r}")
    rule = scorer(task.scorer)
    samples = _draw(
        read_samples(_path(config, task.train), media_root=config.media_root), task.train_limit, config
    )
    questions = _draw(read_questions(_path(config, task.test), config.media_root), task.test_limit, config)
    for question in questions:
        if problem := rule.fits(question.truth):
            where = f"{question.sample.source} (task {task.name!r})"
            raise UserError(f"{where}: the scorer {task.scorer!r} does not fit: {problem}")
    if task.prompt != "{question}":
        samples = [_prompted(sample, task.prompt) for sample in samples]
        questions = [replace(q, sample=_prompted(q.sample, task.prompt)) for q in questions]
    return Experience(index, task, samples, questions)


def _draw(items: list, limit: int | None, config: StreamConfig) -> list:
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise UserError(f"train_limit and test_limit must be at least 1, found {limit}")
    kept = sorted(random.Random(config.seed).sample(range(len(items)), limit))
    return [items[index] for index in kept]


def _prompted(sample: Sample, prompt: str) -> Sample:
    """The sample with ``prompt`` around the last text of each user turn."""
    messages = []
    for message in sample.messages:
        content = list(message["content"])
        texts = [index for index, part in enumerate(content) if part["type"] == "text"]
        if message["role"] == "user" and texts:
            last = content[texts[-1]]
            content[texts[-1]] = {"type": "text", "text": prompt.replace("{question}", last["text"])}
        messages.append({**message, "content": content})
    return replace(sample, messages=messages)


def _path(config: StreamConfig, file: str) -> Path:
    return Path(config.root or ".") / file


def _hash(path: Path) -> str:
    try:
        return file_hash(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a file of a task of the stream") from error
