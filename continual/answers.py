"""Evaluation of one task: greedy answers to its questions, graded, and where its tokens are routed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from unimoe.continual.strategies import Strategy
from unimoe.evaluation.questions import Question
from unimoe.evaluation.scorers import grade_all, scorer
from unimoe.inference.generate import ask_all
from unimoe.model.host_loss import last_hidden
from unimoe.model.inputs import Batch
from unimoe.model.utils import to_device
from unimoe.moe import record
from unimoe.training.ranks import shard_across_ranks, union_over_ranks

from .stream import Experience


def evaluate(strategy: Strategy, task: Experience, batch_size: int = 16) -> dict[str, Any]:
    """Answer and grade every question of ``task``.

    Returns:
        ``accuracy`` and ``known`` in percent (strict grade; right answer in any form), and all ``answers``.
    """
    said = answer(strategy, task.questions, task.config.max_new_tokens, batch_size)
    truths = {question.id: question.truth for question in task.questions}
    grades = grade_all(scorer(task.config.scorer), said, truths, task.name)
    return {
        "accuracy": 100 * sum(grade.score for grade in grades.values()) / len(grades),
        "known": 100 * sum(grade.known for grade in grades.values()) / len(grades),
        "answers": [
            {"id": name, "said": said[name], "right": list(truths[name].answers), **vars(grade)}
            for name, grade in grades.items()
        ],
    }


def answer(
    strategy: Strategy, questions: Sequence[Question], max_new_tokens: int, batch_size: int = 16
) -> dict[str, str]:
    """The model's answer to each question by id; prompts of similar length share a batch.

    The questions are divided among processes, unless the base is sharded over them.
    """
    learner, answers = strategy.learner, {}
    own = questions if learner.divided else shard_across_ranks(questions)
    samples = [question.sample for question in own]

    @contextmanager
    def hooks(batch: Batch) -> Iterator[None]:
        strategy.before_eval(batch)
        try:
            yield
        finally:
            strategy.after_eval()

    for said in ask_all(learner.model, learner.collator, samples, batch_size, max_new_tokens, hooks):
        answers |= {own[index].id: text for index, text in said.items()}
    answers = union_over_ranks(answers)
    return {question.id: answers[question.id] for question in questions}


@torch.no_grad()
def routing_of(strategy: Strategy, task: Experience, samples: int = 32) -> dict[str, Any]:
    """Routing mass of each bank over the prompts of the first questions of ``task``, by block."""
    learner = strategy.learner
    with record() as records:
        for question in task.questions[:samples]:
            batch = to_device(learner.collator.prompts([question.sample]), learner.device)
            last_hidden(learner.model, batch)
    return strategy.routing(records)
