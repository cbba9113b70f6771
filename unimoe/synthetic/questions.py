"""Questions about generated images, and their reference answers."""

import random
import re

from .concepts import GROUPS, TRAINED, Concept
from .scenes import Scene

FORMS = {
    "name": (
        "What is this?",
        "What is in the picture?",
        "What do you see?",
        "Name the thing in the picture.",
    ),
    "group": ("What kind of thing is it?", "What sort of thing is this?"),
    "colour": ("What colour is it?", "Which colour do you see?"),
    "count": ("How many are there?", "How many can you count?"),
    "left": ("What is on the left?", "Name the thing on the left."),
    "right": ("What is on the right?", "Name the thing on the right."),
}
"""Kind of question -> its phrasings. Yes/no questions ("Is this a dog?") are formed from a name."""
COUNTS = ("One.", "Two.", "Three.", "Four.")


SPOKEN_CONCEPTS = tuple(concept for i, concept in enumerate(TRAINED) if i % 3 != 2)
"""Concepts with a recorded yes/no question (two of three, to limit the size of the recordings)."""


def yes_no(concept: Concept) -> str:
    return f"Is this {concept.phrase}?"


def spoken_questions() -> list[str]:
    """Every recorded question: all phrasings, and the yes/no questions of SPOKEN_CONCEPTS."""
    return [text for forms in FORMS.values() for text in forms] + [
        yes_no(concept) for concept in SPOKEN_CONCEPTS
    ]


def name_answer(concept: Concept) -> str:
    phrase = concept.phrase
    return phrase[0].upper() + phrase[1:] + "."


def answer(kind: str, scene: Scene) -> str:
    """The reference answer to a question of FORMS about the scene."""
    if kind == "group":
        return GROUPS[scene.shown[0].group]
    if kind == "colour":
        assert scene.colour is not None
        return scene.colour.capitalize() + "."
    if kind == "count":
        return COUNTS[len(scene.shown) - 1]
    return name_answer(scene.shown[-1] if kind == "right" else scene.shown[0])


def ask(kind: str, scene: Scene, rng: random.Random, likely: list[Concept] | None = None) -> tuple[str, str]:
    """(question, answer). ``yes_no`` asks about the concept shown half of the time, else about another one
    of ``likely``."""
    if kind != "yes_no":
        return rng.choice(FORMS[kind]), answer(kind, scene)
    if rng.random() < 0.5:
        return yes_no(scene.shown[0]), "Yes."
    other = rng.choice([c for c in likely or TRAINED if c.name != scene.shown[0].name])
    return yes_no(other), "No."


def normalise(text: str) -> str:
    """Lower case without punctuation and leading article, for comparing answers."""
    text = re.sub(r"[^a-z0-9 ]+", " ", text.lower()).strip()
    return re.sub(r"\s+", " ", re.sub(r"^(a|an|the|some)\s+", "", text))
