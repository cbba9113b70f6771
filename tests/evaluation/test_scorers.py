import pytest

from unimoe.errors import UserError
from unimoe.evaluation.normalize import forms
from unimoe.evaluation.scorers import SCORERS, Truth, grade_all, knows, scorer


def grade(name, prediction, *answers, **options):
    return scorer(name)(prediction, Truth(tuple(answers), options))


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "imagenet-legacy"])
def test_an_empty_answer_is_wrong(name):
    answers = {"choice": "A", "number": "3", "grounding": "[0, 0, 1, 1]", "grounding-legacy": "[0, 0, 1, 1]"}
    assert grade(name, "  ", answers.get(name, "dog")) == 0


@pytest.mark.parametrize(
    ("name", "prediction", "answers", "expected"),
    [
        ("exact", " a DOG. ", ["A dog"], 1),
        ("exact", "dog", ["A dog"], 0),
        ("exact", "yes .", ["Yes"], 1),
        ("exact", "Yes", ["yes ."], 1),
        ("exact", "yes . .\n", ["yes"], 1),
        ("exact", "...", ["yes"], 0),
        ("exact", ".", [". "], 1),
        ("exact", "3.5", ["35"], 0),
        ("anls", "hello.", ["hello"], 5 / 6),
        ("anls", "HELLO  there", ["hello there"], 1),
        ("number", "1e3", ["1000"], 1),
        ("verbatim", "a dog", ["A dog"], 0),
        ("contains", "It is a hot dog.", ["hot dog"], 1),
        ("contains", "dogma", ["dog"], 0),
        ("choice", "(B)", ["B"], 1),
        ("choice", "B. because", ["B"], 1),
        ("choice", "The answer is B", ["B"], 1),
        ("choice", "Bees", ["B"], 0),
        ("vqa", "Two", ["2"], 1),
        ("vqa", "cat", ["cat"] * 2 + ["dog"] * 8, 2 * (1 / 3) / 10 + 8 * (2 / 3) / 10),
        ("vqa", "cat", ["cat"] * 4 + ["dog"] * 6, 1),
        ("vqa", "1,000", ["1000"] * 10, 1),
        ("vqa", "don't know", ["dont know"] * 10, 1),
        ("vqa", "kitty", ["cat", "kitty"], 1),
        ("number", "1,200.", ["1200"], 1),
        ("number", "about 3", ["3"], 0),
        ("number", "+.5", ["0.5"], 1),
        ("grounding", "[1.0, 0.2, 0.9, 0.85]", ["[0, 0.2, 0.9, 0.85]"], 0),
        ("grounding", "[0.1, 0.2, 0.9, 0.85]", ["[0.1, 0.2, 0.9, 0.8]"], 1),
        ("grounding", "[1e-05, 0.1, 0.5, 0.5]", ["[0.0, 0.1, 0.5, 0.5]"], 1),
        ("grounding", "[0, 0.1, .5, 5.0E-1]", ["[5e-05, 0.1, 0.5, 0.5]"], 1),
        ("grounding", "1 2 3 4 5e-05", ["[1, 2, 3, 4]"], 0),
        ("anls", "hallo", ["hello"], 0.8),
        ("anls", "xyz", ["hello"], 0),
        ("rouge", "a dog runs", ["the cat", "a dog runs fast"], 2.44 * 0.75 / (0.75 + 1.44)),
        ("rouge", "A dog runs.", ["a dog runs"], 1),
        ("rouge", "a dog runs .", ["A dog runs."], 1),
        ("rouge", "a dog, running; fast!", ["A dog running fast"], 1),
        ("rouge", "a dog", ["dog"], 2.44 * 0.5 / (1 + 1.44 * 0.5)),
        # precision of the first reference and recall of the second, as in pycocoevalcap
        ("rouge", "a b c d", ["a b c d e f g h", "a b"], 1),
    ],
)
def test_rules(name, prediction, answers, expected):
    assert grade(name, prediction, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    "said",
    [
        *("A", "a)", "**A**", "[A]", "A: E. coli", "A E. coli", "A\nbecause it moves", "E. coli", "e. coli."),
        *("Answer: A", "Option A", "Choice: (a)", "The answer is a", "The answer is E. coli"),
        *("The correct answer is A because it moves", "The correct answer is option A"),
        "Option B is wrong, so the answer is A.",
    ],
)
def test_an_option_is_named_by_letter_or_text(said):
    options = {"A": "E. coli", "B": "S. aureus"}
    assert [grade("choice", said, right, **options) for right in ("A", "E. coli", "B")] == [1, 1, 0]


@pytest.mark.parametrize(
    "said",
    [
        *("E", "E.", "A dog", "S. coli", "answers", "I do not know", "The answer is clear"),
        *("A, B, C", "A) or B)", "B and A", "The answer is A or B"),
    ],
)
def test_no_option_is_named(said):
    assert [grade("choice", said, right, A="E. coli", B="S. aureus", C="x") for right in "ABC"] == [0, 0, 0]


def test_legacy_rules_keep_the_published_defects():
    assert grade("imagenet-legacy", "", "dog") == 1
    assert grade("imagenet-legacy", "d", "dog") == 1
    # "[1.0, 0.2, 0.9, 0.85]" is read as .0, 0.2, 0.9, 0.8
    assert grade("grounding-legacy", "[1.0, 0.2, 0.9, 0.85]", "[0, 0.2, 0.9, 0.85]") == 1


@pytest.mark.parametrize(
    ("prediction", "answers", "known"),
    [
        ("The answer is: DOG", ["dog"], True),
        ("three", ["3"], True),
        ("It is a hot dog", ["hot dog"], True),
        ("dog or cat", ["dog"], False),  # names another answer too
        ("hot dog", ["dog"], False),  # another thing
        ("dogs", ["dog"], False),
    ],
)
def test_knowledge_in_another_form(prediction, answers, known):
    assert knows(prediction, Truth(tuple(answers)), forms(["dog", "cat", "hot dog"])) is known


@pytest.mark.parametrize("name", ["contains", "vqa"])
@pytest.mark.parametrize("truth", ["A", "the", "%", "?"])
def test_an_answer_without_words_is_not_in_everything(name, truth):
    assert grade(name, "banana", truth) == 0
    assert grade(name, truth.lower(), truth) == 1


def test_an_option_beside_the_right_one_is_a_guess():
    truth = Truth(("B",), {"A": "the sun", "B": "the moon"})
    assert knows("it is the moon", truth) and not knows("the sun or the moon", truth)


def test_format_drift_is_told_from_lost_knowledge():
    truths = {"1": Truth(("3",)), "2": Truth(("4",)), "3": Truth(("2",))}
    grades = grade_all(scorer("exact"), {"1": "three", "2": "4", "3": "A dog."}, truths, "counting")
    assert [(g.score, g.known) for g in grades.values()] == [(0, 1), (1, 1), (0, 0)]


def test_answers_are_matched_by_id():
    truths = {"1": Truth(("a",)), "2": Truth(("b",))}
    assert [g.score for g in grade_all(scorer("exact"), {"2": "b", "1": "a"}, truths, "t").values()] == [1, 1]
    with pytest.raises(UserError, match="'2' is missing"):
        grade_all(scorer("exact"), {"1": "a"}, truths, "t")
    with pytest.raises(UserError, match="'9' belongs to no question"):
        grade_all(scorer("exact"), {"1": "a", "2": "b", "9": "c"}, truths, "t")


def test_what_does_not_fit():
    assert "no box" in SCORERS["grounding"].fits(Truth(("a dog",)))
    assert "no letter" in SCORERS["choice"].fits(Truth(("a dog",)))
    assert "'F' is none of the options A, B" in SCORERS["choice"].fits(Truth(("F",), {"A": "x", "B": "y"}))
    assert "no box" in SCORERS["grounding"].fits(Truth(("[0.9, 0.8, 0.1, 0.2]",)))
    assert SCORERS["vqa"].fits(Truth(("", "cat"))) == ""
    assert SCORERS["number"].fits(Truth(("three",))) == ""
    with pytest.raises(UserError, match="expected one of exact"):
        scorer("exakt")
