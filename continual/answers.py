"""Asking: greedy answers to the questions of a task, graded; and where its tokens were routed."""

from collections.abc import Sequence
from typing import Any

import torch

from unimoe.continual.strategies import Strategy
from unimoe.continual.strategies.dymoe import IncMoELoRA
from unimoe.evaluation.questions import Question
from unimoe.evaluation.scorers import grade_all, scorer
from unimoe.inference.generate import ask_all
from unimoe.model.loss import last_hidden
from unimoe.model.utils import to_device
from unimoe.training.ranks import shard_across_ranks, union_over_ranks

from .guidance import TYPES
from .routing_log import by_block
from .stream import Experience


def evaluate(strategy: Strategy, task: Experience, batch_size: int = 16) -> dict[str, Any]:
    """Ask every question of ``task``.

    Returns ``accuracy`` and ``known`` in percent (strictly right; right in any form), and all ``answers``.
    """
    said = ask(strategy, task.questions, task.config.max_new_tokens, batch_size)
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


def ask(
    strategy: Strategy, questions: Sequence[Question], max_new_tokens: int, batch_size: int = 16
) -> dict[str, str]:
    """The model's answer to each question by id; prompts of like length share a batch.

    Several processes share out the questions, unless they share the base.
    """
    learner, answers = strategy.learner, {}
    own = questions if learner.divided else shard_across_ranks(questions)
    samples = [question.sample for question in own]
    around = strategy.answering
    for said in ask_all(learner.model, learner.collator, samples, batch_size, max_new_tokens, around):
        answers |= {own[index].id: answer for index, answer in said.items()}
    answers = union_over_ranks(answers)
    return {question.id: answers[question.id] for question in questions}


@torch.no_grad()
def routing_of(strategy: IncMoELoRA, task: Experience, samples: int = 32) -> dict[str, Any]:
    """Mass of each bank over the prompts of the first questions of ``task``, by block."""
    learner, guide = strategy.learner, strategy.guide
    guide.take()
    for question in task.questions[:samples]:
        batch = to_device(learner.collator.prompts([question.sample]), learner.device)
        with guide.collect(None):
            last_hidden(learner.model, batch)
    return by_block(guide.take(), TYPES)
