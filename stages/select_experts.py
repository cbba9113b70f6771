"""``unimoe select experts``: the adapters of an open bank that serve a task of which there are a few labelled
samples (ROCKET, arXiv 2408.15915).

1. each adapter of the bank answers the K shots: share of right answers, and perplexity of the reference
   answers, reasoning included. Right answers with a high perplexity are those of a blind guesser
2. the sum of both ranks gives the candidates (the paper's code leaves the fusion open)
3. of all groups of candidates the one with the smallest sum of two ranks is chosen: that of its members, and
   that of its similarity, the sum of |cos| over pairs of members and their LoRA factors

Shapes: C candidates.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from unimoe.data import Collator, Sample, read_samples
from unimoe.errors import UserError
from unimoe.evaluation.questions import read_questions
from unimoe.evaluation.scorers import scorer
from unimoe.files import atomic_write
from unimoe.inference.generate import ask_all
from unimoe.model.host_loss import answer_loss
from unimoe.model.loading import find_model, load_model
from unimoe.model.utils import to_device

from .adapter_bank import applied, projections_of, read_bank, similarity

log = logging.getLogger(__name__)

MOST = 16


@dataclass(frozen=True)
class Score:
    """An adapter on the shots."""

    name: str
    accuracy: float
    perplexity: float


def experts(
    model: str,
    shots: str,
    /,
    *,
    bank: list[str],
    count: int = 4,
    candidates: int = 8,
    output: str = "runs/selected.json",
    max_new_tokens: int = 64,
) -> None:
    """Choose adapters for a task of which there are a few labelled samples.

    Args:
        model: folder of the base that the adapters belong to.
        shots: file of conversations whose last turn is the reference, with its reasoning; "answers" beside it
            is what an answer must contain to be right.
        bank: peft adapters, or folders of them; `unimoe continual export` writes such.
        count: adapters to choose.
        candidates: adapters that are left after the ranks of accuracy and perplexity.
        output: file for the scores and the choice.
        max_new_tokens: longest answer to a shot.

    Raises:
        UserError: too few adapters, or one that does not belong to the model.
    """
    if not 1 <= count <= candidates <= MOST:
        raise UserError(
            f"--count {count} --candidates {candidates}: expected 1 <= count <= candidates <= {MOST}"
        )
    adapters = read_bank(bank)
    if len(adapters) < count:
        raise UserError(f"--bank holds {len(adapters)} adapters, expected at least {count} (--count)")
    samples, questions = read_samples(shots), read_questions(shots)
    find_model(model)
    llm, processor = load_model(model)
    llm.eval()
    for adapter in adapters:
        projections_of(llm, adapter)
    scores = []
    for number, adapter in enumerate(adapters, 1):
        with applied(llm, adapter):
            right = accuracy(llm, processor, questions, max_new_tokens)
            scores.append(Score(adapter.name, right, answer_perplexity(llm, processor, samples)))
        log.info(
            "%d/%d  %s: accuracy %.3f, perplexity %.3f", number, len(adapters), *vars(scores[-1]).values()
        )
    kept = leading(scores, candidates)
    similar_CC = [[similarity(adapters[one], adapters[other]) for other in kept] for one in kept]
    chosen = [kept[place] for place in diverse(len(kept), similar_CC, min(count, len(kept)))]
    found = {
        "model": model,
        "shots": shots,
        "chosen": [adapters[index].name for index in chosen],
        "candidates": [adapters[index].name for index in kept],
        "scores": [vars(score) for score in scores],
    }
    atomic_write(Path(output), json.dumps(found, indent=1) + "\n")
    log.info("%s: chose %s", output, ", ".join(found["chosen"]))


def accuracy(model: Any, processor: Any, questions: Sequence[Any], max_new_tokens: int) -> float:
    """Share of the shots whose answer contains the reference."""
    answers: dict[int, str] = {}
    samples = [question.sample for question in questions]
    for some in ask_all(model, Collator(processor), samples, max_new_tokens=max_new_tokens):
        answers |= some
    grade = scorer("contains")
    return fmean(grade(answers[index], question.truth) for index, question in enumerate(questions))


@torch.no_grad()
def answer_perplexity(model: Any, processor: Any, samples: Sequence[Sample]) -> float:
    """Mean over the shots of exp(mean negative log-likelihood of the tokens of the reference)."""
    collator, values = Collator(processor), []
    for sample in samples:
        batch = to_device(collator([sample]), model.device)
        values.append(float(answer_loss(model, [batch])[0].exp()))
    return fmean(values)


def leading(scores: Sequence[Score], candidates: int) -> list[int]:
    """Indices of the best by the sum of the ranks of accuracy and perplexity; ties by perplexity."""
    by_accuracy = _ranks([-score.accuracy for score in scores])
    by_perplexity = _ranks([score.perplexity for score in scores])
    order = sorted(
        range(len(scores)), key=lambda one: (by_accuracy[one] + by_perplexity[one], scores[one].perplexity)
    )
    return order[:candidates]


def diverse(candidates: int, similar_CC: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The group of ``count`` candidates, best first, with the smallest sum of its ranks by its members and by
    their similarity."""
    groups = list(combinations(range(candidates), count))
    places = _ranks([float(sum(group)) for group in groups])
    alike = _ranks([sum(similar_CC[one][other] for one, other in combinations(g, 2)) for g in groups])
    best = min(range(len(groups)), key=lambda one: (places[one] + alike[one], places[one]))
    return groups[best]


def _ranks(values: Sequence[float]) -> list[int]:
    """Place of each value from the smallest, 0; equal values have equal places."""
    order = {value: place for place, value in enumerate(sorted(set(values)))}
    return [order[value] for value in values]
