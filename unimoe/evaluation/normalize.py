"""Text as scorers compare it: one line, words, caption tokens."""

import re
from collections.abc import Iterable

_NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMERALS.split())}
"""Number word -> numeral."""
_ARTICLES = {"a", "an", "the"}
_CAPTION_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[^\W_]+(?:['\u2019/-][^\W_]+)*|[^\w\s]")
_CAPTION_PUNCTUATION = set("'\u2019`\"\u201c\u201d()[]{}.?!,:;-\u2013\u2014")
_CONTRACTION = re.compile(r"(.+?)(n't|'(?:s|re|ve|ll|d|m))")


def one_line(text: str) -> str:
    """Lower case, with single blanks."""
    return " ".join(text.lower().split())


def without_stop(text: str) -> str:
    """``one_line`` without full stops at the end and the blanks before them, unless nothing is left."""
    line = one_line(text)
    return line.rstrip(". ") or line


def words(text: str) -> list[str]:
    """Lower-case words, numerals for number words, without punctuation and articles."""
    found: list[str] = re.findall(r"[^\W_]+(?:[.'][^\W_]+)*", text.lower())
    return [NUMBERS.get(word, word) for word in found if word not in _ARTICLES]


def forms(answers: Iterable[str]) -> set[tuple[str, ...]]:
    """Answers as words, except those without any."""
    return {form for answer in answers if (form := tuple(words(answer)))}


def caption_tokens(text: str) -> list[str]:
    """Tokens as COCO's caption evaluation compares them: those of the Penn Treebank, lower-cased, without
    punctuation; contractions are two tokens (``do n't``), hyphenated words one.

    COCO runs Stanford's Java tokenizer; this is its rule for plain sentences.
    """
    tokens: list[str] = []
    for token in _CAPTION_TOKEN.findall(text.lower()):
        if contraction := _CONTRACTION.fullmatch(token.replace("\u2019", "'")):
            tokens += contraction.groups()
        elif token not in _CAPTION_PUNCTUATION:
            tokens.append(token)
    return tokens
