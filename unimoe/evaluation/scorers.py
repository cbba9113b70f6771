"""Grades of answers: one scorer per task, and whether a wrong answer is lost knowledge or only lost form.

Each scorer gives a strict grade in [0, 1], the task's own. ``knows`` is the lenient question beside it:
whether the right answer is contained at all, regardless of letter case, numerals or surrounding words. An
answer that is wrong strictly and known leniently has drifted in format; published numbers count it as
forgotten.

Answers are matched to questions by id, never by position, and an empty answer is wrong under every scorer.
The scorers named ``*-legacy`` reproduce the code behind published tables, including its defects.
"""

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

from unimoe.errors import UserError

from .normalize import NUMBERS, caption_tokens, forms, one_line, without_stop, words


@dataclass(frozen=True)
class Truth:
    """The reference of one question."""

    answers: tuple[str, ...]
    """Accepted answers; for ``vqa`` the answers of the ten annotators."""
    options: dict[str, str] = field(default_factory=dict)
    """Options of a multiple choice: capital letter -> text."""


@dataclass(frozen=True)
class Scorer:
    """One rule."""

    grade: Callable[[str, Truth], float]
    """Strict grade of a prediction that is not empty."""
    fits: Callable[[Truth], str] = lambda truth: ""
    """Why the rule cannot grade such an answer; empty where it can."""
    empty: float = 0.0
    """Grade of an empty prediction; not 0 only for a legacy rule."""
    version: int = 2
    """Raised whenever a grade changes; runs record it, so that different rules are never compared."""

    def __call__(self, prediction: str, truth: Truth) -> float:
        prediction = prediction.strip()
        return self.grade(prediction, truth) if prediction else self.empty


def scorer(name: str) -> Scorer:
    """
    Raises:
        UserError: for an unknown name; lists all.
    """
    if name not in SCORERS:
        raise UserError(f"there is no scorer {name!r}, expected one of {', '.join(SCORERS)}")
    return SCORERS[name]


def knows(prediction: str, truth: Truth, others: Set[tuple[str, ...]] = frozenset()) -> bool:
    """Whether the prediction contains a right answer as whole words, in any form.

    Args:
        prediction: what the model answered.
        truth: the reference.
        others: ``forms`` of the task's other answers. A prediction that names one of them as well is a guess,
            not knowledge (unless it is part of the right answer, such as "dog" in "hot dog").
    """
    others = others | forms(truth.options.values())
    letters = [answer.strip("(). ").upper() for answer in truth.answers]
    right = forms(truth.answers) | forms(truth.options[a] for a in letters if a in truth.options)
    rest, named = words(prediction), set()
    ends = range(1, len(rest) + 1)
    spans = {tuple(rest[start:end]) for end in ends for start in range(end)}
    for answer in sorted((spans & right) | (spans & others), key=len, reverse=True):
        if _contains(rest, answer):
            named.add(answer)
            rest = _remove(rest, list(answer))
    return bool(named) and named <= right


def _contains(said: Sequence[str], wanted: Sequence[str]) -> bool:
    return any(list(said[i : i + len(wanted)]) == list(wanted) for i in range(len(said) - len(wanted) + 1))


def _remove(said: list[str], gone: list[str]) -> list[str]:
    for i in range(len(said) - len(gone) + 1):
        if said[i : i + len(gone)] == gone:
            return said[:i] + ["\n"] + _remove(said[i + len(gone) :], gone)
    return said


# -------------------------------------------------------------------- the rules


def _exact(prediction: str, truth: Truth) -> float:
    """Regardless of case, runs of blanks, and a full stop at the end with the blanks before it."""
    return float(without_stop(prediction) in {without_stop(answer) for answer in truth.answers})


def _verbatim(prediction: str, truth: Truth) -> float:
    return float(prediction in truth.answers)


def _contained(prediction: str, truth: Truth) -> float:
    """The prediction contains the answer as whole words, or equals it if it has none ("a", "%")."""
    said = words(prediction)
    return float(
        any(
            _contains(said, wanted)
            if (wanted := words(answer))
            else without_stop(prediction) == without_stop(answer)
            for answer in truth.answers
        )
    )


_ANNOUNCED = [
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (r".*?\banswer(?: is\b|:)[\s:*]*(.*)", r"\W*(?:option|choice|answer)\b[\s:*]*(.*)")
]
_LETTERED = re.compile(r"[\[(]?([A-Za-z])(?:[\]).:,\n]+|\s+|$)\s*(.*)", re.DOTALL)
_ANOTHER = re.compile(r"(?:(?:and|or|&|/|,)\s*)*[\[(]?[A-Z](?:$|[\]),./&:]|\s+(?:and|or)\b)")


def _letter(text: str, options: dict[str, str]) -> str | None:
    """Letter of the option that ``text`` names, if it does: "B", "(b)", "B: ...", "B dog", "dog"."""
    text = text.strip().strip("*_").strip()
    by_text = {without_stop(option): letter for letter, option in options.items()}
    match = _LETTERED.fullmatch(text)
    if not match or (match[2] and without_stop(text) in by_text):  # "E. coli" is no letter
        return by_text.get(without_stop(text))
    letter, rest = match[1].upper(), match[2]
    between = text[match.end(1) : match.start(2)].strip(" ")
    sure = by_text.get(without_stop(rest)) == letter
    marked = sure or ((between or not rest) and not _ANOTHER.match(rest))  # "A, B" chooses none
    return letter if marked and (letter in options or not options) else by_text.get(without_stop(text))


def _chosen(text: str, options: dict[str, str]) -> str | None:
    """The letter that ``text`` names at once or behind "the answer is", "option:", ..."""
    chosen = _letter(text, options)
    for pattern in _ANNOUNCED:
        if chosen is None and (announced := pattern.match(text)):
            capital = re.match(r"([A-Z])\b(?!\s*(?:,|/|&|and\b|or\b))", announced[1])
            chosen = _chosen(announced[1], options) or (capital and capital[1])
    return chosen


def _choice(prediction: str, truth: Truth) -> float:
    """The letter of one option, its text, or both."""
    right = {_letter(answer, truth.options) for answer in truth.answers}
    return float(_chosen(prediction, truth.options) in right)


def _soft(prediction: str, truth: Truth) -> float:
    """VQA's min(1, matches / 3), averaged over leaving one annotator out, without apostrophes and thousands
    commas (TextVQA, VQAv2, VizWiz); of one to three answers, with which it cannot be 1, any one."""
    said = _vqa(prediction)
    matches = [_vqa(answer) == said for answer in truth.answers]
    if len(matches) <= 3:
        return float(any(matches))
    return sum(min(1.0, (sum(matches) - own) / 3) for own in matches) / len(matches)


def _vqa(text: str) -> list[str] | str:
    return words(re.sub(r"(?<=\d),(?=\d{3}\b)|'", "", text)) or without_stop(text)


def _number(text: str) -> float | None:
    number = r"\s*\$?([-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*%?\.?\s*"
    match = re.fullmatch(number, NUMBERS.get(without_stop(text), text))
    return float(match[1].replace(",", "")) if match else None


def _numeric(prediction: str, truth: Truth) -> float:
    value = _number(prediction)
    return float(value is not None and value in {_number(answer) for answer in truth.answers})


def _box(text: str) -> list[float] | None:
    numbers = [float(found) for found in re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", text)]
    return numbers if len(numbers) == 4 else None


def _iou(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def _grounding(prediction: str, truth: Truth) -> float:
    """IoU above 0.5 of boxes [x1, y1, x2, y2]."""
    found = _box(prediction)
    boxes = [box for answer in truth.answers if (box := _box(answer))]
    return float(found is not None and any(_iou(found, box) > 0.5 for box in boxes))


def _anls(prediction: str, truth: Truth) -> float:
    """Normalised Levenshtein similarity to the nearest answer, regardless of case and runs of blanks; 0 below
    0.5 (Biten et al., 2019; DocVQA)."""
    best = 0.0
    for answer in truth.answers:
        one, other = one_line(prediction), one_line(answer)
        best = max(best, 1 - _distance(one, other) / max(len(one), len(other), 1))
    return best if best >= 0.5 else 0.0


def _distance(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        previous, row = row, [i]
        for j, b in enumerate(other, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def _rouge(prediction: str, truth: Truth) -> float:
    """ROUGE-L (Lin, 2004) as COCO's caption evaluation computes it: F with beta 1.2 of the longest common
    subsequence of tokens; precision and recall are each the best over the references."""
    said, precision, recall = caption_tokens(prediction), 0.0, 0.0
    for answer in truth.answers:
        wanted = caption_tokens(answer)
        common = _common_subsequence(said, wanted)
        precision = max(precision, common / max(len(said), 1))
        recall = max(recall, common / max(len(wanted), 1))
    if not precision:
        return 0.0
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def _common_subsequence(said: Sequence[str], wanted: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(wanted) + 1)
    for one in said:
        previous, row = row, [0]
        for j, other in enumerate(wanted):
            row.append(previous[j] + 1 if one == other else max(previous[j + 1], row[-1]))
    return row[-1]


def _imagenet_legacy(prediction: str, truth: Truth) -> float:
    """CoIN's: one string contains the other."""
    said, answer = prediction.lower(), truth.answers[0].lower()
    return float(answer in said or said in answer)


def _grounding_legacy(prediction: str, truth: Truth) -> float:
    """CoIN's: brackets are removed, and then the first and the last character as well."""

    def read(text: str) -> list[float] | None:
        try:
            numbers = [float(part) for part in text.replace("[", "").replace("]", "")[1:-1].split(",")]
        except ValueError:
            return None
        return numbers if len(numbers) == 4 else None

    found, box = read(prediction), _box(truth.answers[0])
    return float(found is not None and box is not None and _iou(found, box) > 0.5)


# -------------------------------------------------------------------- what each can grade


def _wants_letter(truth: Truth) -> str:
    bad = [answer for answer in truth.answers if _letter(answer, truth.options) is None]
    wanted = f"none of the options {', '.join(truth.options)}" if truth.options else "no letter"
    return f"the answer {bad[0]!r} is {wanted}" if bad else ""


def _wants_number(truth: Truth) -> str:
    bad = [answer for answer in truth.answers if _number(answer) is None]
    return f"the answer {bad[0]!r} is no number" if bad else ""


def _wants_box(truth: Truth) -> str:
    bad = [answer for answer in truth.answers if not (box := _box(answer)) or _iou(box, box) != 1]
    return f"the answer {bad[0]!r} is no box [x1, y1, x2, y2]" if bad else ""


def _wants_text(truth: Truth) -> str:
    return "" if all(answer.strip() for answer in truth.answers) else "an answer is empty"


def _wants_some_text(truth: Truth) -> str:
    return "" if any(answer.strip() for answer in truth.answers) else "every answer is empty"


SCORERS = {
    "exact": Scorer(_exact, _wants_text, version=3),
    "verbatim": Scorer(_verbatim, _wants_text),
    "contains": Scorer(_contained, _wants_text, version=3),
    "choice": Scorer(_choice, _wants_letter, version=3),
    "vqa": Scorer(_soft, _wants_some_text, version=3),  # an annotator may have written nothing
    "number": Scorer(_numeric, _wants_number, version=3),
    "grounding": Scorer(_grounding, _wants_box, version=3),
    "anls": Scorer(_anls, _wants_text, version=3),
    "rouge": Scorer(_rouge, _wants_text, version=3),
    "imagenet-legacy": Scorer(_imagenet_legacy, _wants_text, empty=1.0),
    "grounding-legacy": Scorer(_grounding_legacy, _wants_box),
}
"""Scorers by name, as in the YAML of a stream."""


@dataclass(frozen=True)
class Grade:
    """One graded answer."""

    score: float
    """Strict, by the task's scorer."""
    known: float
    """1 if the right answer is contained in any form; never below the strict score."""


def grade_all(
    rule: Scorer, predictions: dict[str, str], truths: dict[str, Truth], where: str
) -> dict[str, Grade]:
    """Grade answers by id.

    Raises:
        UserError: if an answer is missing or belongs to no question.
    """
    if predictions.keys() != truths.keys():
        wrong = sorted(predictions.keys() ^ truths.keys())
        side = "is missing" if wrong[0] in truths else "belongs to no question"
        raise UserError(f"{where}: the answer to {wrong[0]!r} {side} ({len(wrong)} such)")
    vocabulary = forms(answer for truth in truths.values() for answer in truth.answers)
    grades = {}
    for name, prediction in predictions.items():
        score = rule(prediction, truths[name])
        lenient = float(knows(prediction, truths[name], vocabulary)) if prediction.strip() else 0.0
        grades[name] = Grade(score, max(score, lenient))
    return grades
