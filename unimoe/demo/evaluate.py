"""Evaluation of one model: accuracy on the test questions, perplexity of English text, expert load.

    test.<set>.jsonl -> Question -> features from the cache -> greedy answers -> exact-name accuracy
    prose            -> perplexity                    MoE: questions -> record() -> load by layer and modality

Results are added to one JSON file set by set, so an interrupted evaluation resumes at the next set.
Shapes: L MoE layers, E experts, S predicted tokens, V vocabulary.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unimoe.analysis.routing_stats import RoutingStats
from unimoe.data import Collator, FeatureCache, Sample
from unimoe.data.read import read_records
from unimoe.data.records import parse_record
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.inference.generate import ask_all
from unimoe.model.loss import cross_entropy_sum, supervised
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.model.utils import count_parameters, to_device
from unimoe.moe import record
from unimoe.moe.install import moe_layers
from unimoe.progress import progress
from unimoe.synthetic.questions import normalise

log = logging.getLogger(__name__)

TITLES = {
    "new_backgrounds": "new backgrounds",
    "unseen_artist": "unseen artist",
    "text_questions": "written questions about images",
    "spoken_questions": "the same questions, spoken",
    "unseen_voice": "the same, spoken by an unseen speaker",
    "held_out": "objects not seen in training",
    "speech": "speech transcription",
    "videos": "short videos",
    "sounds": "environmental sounds",
    "sounds_asked": "environmental sounds, spoken question",
}
"""The test sets, in order; sets without a file are skipped."""

EXTENDED = ("speech", "videos", "sounds", "sounds_asked")
"""Test sets of the extended demo."""

LONGEST_ANSWER = 12
"""Tokens; the longest correct answer has about six."""


@dataclass(frozen=True)
class Question:
    """A conversation to be answered, with the facts by which scores are split and baselines are fitted."""

    sample: Sample
    """The turns before the answer."""
    answer: str
    """The reference answer."""
    facts: dict[str, Any]
    """Other keys of its record: ``kind`` of question, ``concept``, ``speaker``, ``question`` as text."""

    def is_right(self, answer: str) -> bool:
        """Exact match, ignoring case, punctuation and a leading article: the classes of the baselines, so
        that both are scored alike."""
        return normalise(answer) == normalise(self.answer)


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a messages JSONL file whose last turns are the reference answers.

    Raises:
        UserError: a record is malformed (names file and line), or there is none.
    """
    questions = []
    for source, line in read_records(path):
        facts = {key: value for key, value in line.items() if key not in ("id", "messages")}
        sample = parse_record(line, source, Path(path).parent)
        questions.append(Question(*sample.split_answer(), facts))
    if not questions:
        raise UserError(f"{path}: the file holds no questions")
    return questions


def evaluate(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    data: str | Path,
    features: FeatureCache,
    prose: str,
    result: str | Path,
    made_of: str,
) -> dict[str, Any]:
    """Evaluate ``model`` on every test set in the folder ``data``; returns the content of ``result``.

    Args:
        features: cache of the frozen encoders' outputs; missing entries are computed.
        prose: English text for the perplexity.
        result: JSON file to write; results it already holds are kept.
        made_of: hash of model and questions; a ``result`` with another hash is replaced.
    """
    found = _read_result(Path(result), made_of)

    def keep(**news: Any):
        found.update(news)
        atomic_write(result, json.dumps(found, indent=1) + "\n")

    sets = {name: Path(data) / f"test.{name}.jsonl" for name in TITLES}
    questions = {name: read_questions(path) for name, path in sets.items() if path.is_file()}
    samples = [question.sample for several in questions.values() for question in several]
    features.fill(samples)
    for name, several in questions.items():
        if name not in found["sets"]:
            with progress(f"      {TITLES[name]}", len(several)) as advance:
                answers = ask(model, processor, several, features, advance)
            keep(sets={**found["sets"], name: score(several, answers)})
        log.info("      %-38s %.3f", TITLES[name], found["sets"][name]["accuracy"])
    if "perplexity" not in found:
        keep(perplexity=perplexity(model, processor, prose))
    log.info("      %-38s %.2f", "perplexity of English text", found["perplexity"])
    if "load" not in found:
        total, active = count_parameters(model)
        load = load_by_modality(model, processor, questions, features)
        keep(parameters={"total": total, "active": active}, load=load, complete=True)
    return found


def _read_result(path: Path, made_of: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    return found if found.get("made_of") == made_of else {"made_of": made_of, "sets": {}}


def ask(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    questions: Sequence[Question],
    features: FeatureCache,
    advance: Callable[[int], None] = lambda done: None,
    batch_size: int = 16,
) -> list[str]:
    """Greedy answers, in order; prompts of similar length share a batch. All media must be cached."""
    collator = Collator(processor, features=features)
    answers: dict[int, str] = {}
    samples = [question.sample for question in questions]
    for said in ask_all(model, collator, samples, batch_size, LONGEST_ANSWER):
        answers |= said
        advance(len(answers))
    return [answers[index] for index in range(len(questions))]


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """``accuracy`` (exact match), ``count``, accuracy ``by_kind`` of question, and all answers."""
    rows: list[dict[str, Any]] = []
    for question, answer in zip(questions, answers, strict=True):
        right = question.is_right(answer)
        rows.append({"answer": answer, "truth": question.answer, "right": right, **question.facts})
    kinds = {row.get("kind", "") for row in rows}
    return {
        "accuracy": _share(rows),
        "count": len(rows),
        "by_kind": {
            kind: _share([row for row in rows if row.get("kind", "") == kind]) for kind in sorted(kinds)
        },
        "answers": rows,
    }


def _share(rows: Sequence[Mapping[str, Any]]) -> float:
    return round(sum(row["right"] for row in rows) / len(rows), 4)


@torch.inference_mode()
def perplexity(
    model: UniMoeForConditionalGeneration, processor: UniMoeProcessor, text: str, window: int = 512
) -> float:
    """Perplexity of ``text``, in windows of ``window`` tokens."""
    ids = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    loss, count = 0.0, 0
    for start in range(0, len(ids), window):
        row_1T = torch.tensor([ids[start : start + window]], device=model.device)
        logits_SV, labels_S = supervised(model(input_ids=row_1T).logits, row_1T)
        loss += cross_entropy_sum(logits_SV, labels_S).item()
        count += len(labels_S)
    if not count:
        raise UserError("the text has fewer than two tokens; perplexity needs at least two")
    return round(math.exp(loss / count), 4)


@torch.inference_mode()
def load_by_modality(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    questions: Mapping[str, Sequence[Question]],
    features: FeatureCache,
    most: int = 64,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Expert load over the first ``most`` prompts of each set; empty for a dense model.

    Returns ``layers`` (indices of the decoder layers, L), and for ``all`` tokens and those of each modality
    that occurs a matrix [L][E] whose rows sum to 1.
    """
    stats, collator = RoutingStats(), Collator(processor, features=features)
    if moe_layers(model):
        for several in questions.values():
            for start in range(0, min(len(several), most), batch_size):
                chosen = several[start : start + batch_size]
                batch = collator.prompts([question.sample for question in chosen])
                with record() as records:
                    model.model(**to_device(batch, model.device))
                stats.add(records)
    return stats.expert_load()
