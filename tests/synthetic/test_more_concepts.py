"""The further concepts: names a person would type, and held-out words that no trained name has."""

import re

from unimoe.synthetic.concepts import HELD_OUT, TRAINED
from unimoe.synthetic.more_concepts import MORE_HELD_OUT, MORE_TRAINED, short_name

EVERY = (*TRAINED, *HELD_OUT, *MORE_TRAINED, *MORE_HELD_OUT)


def test_more_than_600_names_each_with_one_drawing():
    assert len(TRAINED + MORE_TRAINED) == 731 and len(HELD_OUT + MORE_HELD_OUT) == 58
    assert len({concept.name for concept in EVERY}) == len({concept.char for concept in EVERY}) == len(EVERY)
    for concept in EVERY:
        assert len(concept.char) == 1 and re.fullmatch("[a-z]+([ -][a-z]+)*", concept.name), concept


def test_no_trained_name_has_a_word_of_a_held_out_one():
    trained = {word for concept in TRAINED + MORE_TRAINED for word in re.split("[ -]", concept.name)}
    held_out = {word for concept in HELD_OUT + MORE_HELD_OUT for word in re.split("[ -]", concept.name)}
    assert trained & held_out <= {"of", "and"}


def test_short_names():
    assert short_name("\U0001f43a") == "wolf"  # WOLF FACE
    assert short_name("\U0001f4f8") == "camera"  # CAMERA WITH FLASH
    assert short_name("\U0001f32e") == "taco"
