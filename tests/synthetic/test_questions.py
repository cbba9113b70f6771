import random

import pytest
from PIL import Image

from unimoe.synthetic.concepts import BY_NAME, HELD_OUT, TRAINED
from unimoe.synthetic.questions import answer, ask, name_answer, normalise
from unimoe.synthetic.scenes import Scene, colour_word


def test_at_least_seventy_concepts_of_one_code_point() -> None:
    assert len(TRAINED) >= 70 and len(BY_NAME) == len(TRAINED) + len(HELD_OUT) >= 80
    assert all(len(concept.char) == 1 for concept in BY_NAME.values())


@pytest.mark.parametrize("text", ["A dog.", "dog", "the Dog!", " a  dog "])
def test_normalise_drops_case_article_and_punctuation(text: str) -> None:
    assert normalise(text) == "dog"


def test_answers() -> None:
    fox, owl = BY_NAME["fox"], BY_NAME["owl"]
    scene = Scene(Image.new("RGB", (8, 8)), [fox, owl], None)
    assert (answer("left", scene), answer("right", scene)) == ("A fox.", "An owl.")
    assert answer("count", Scene(scene.image, [fox] * 3, None)) == "Three."
    assert name_answer(BY_NAME["broccoli"]) == "Broccoli."


def test_yes_and_no_are_in_balance() -> None:
    scene = Scene(Image.new("RGB", (8, 8)), [BY_NAME["fox"]], "orange")
    replies = [ask("yes_no", scene, random.Random(i)) for i in range(400)]
    assert 160 < sum(reply == "Yes." for _, reply in replies) < 240
    assert all((question == "Is this a fox?") == (reply == "Yes.") for question, reply in replies)


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((220, 20, 20), "red"),
        ((20, 40, 220), "blue"),
        ((120, 70, 30), "brown"),
        ((250, 250, 250), "white"),
        ((5, 5, 5), "black"),
    ],
)
def test_colour_word(rgb: tuple[int, int, int], word: str) -> None:
    assert colour_word(Image.new("RGBA", (20, 20), (*rgb, 255))) == word
