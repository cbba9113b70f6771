"""Text as it comes: the same as all at once, never half a character, never the beginning of a stop string."""

import random

import pytest

from unimoe.model.llm import byte_tokenizer
from unimoe.serve.text import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def stream(tokenizer, tokens, stops=()):
    text, pieces = TextStream(tokenizer, list(stops)), []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces
    return [*pieces, text.end()]


def test_characters_of_several_tokens_come_whole(tokenizer):
    said = "naïve 🦊 – 你好"
    pieces = stream(tokenizer, tokenizer(said)["input_ids"])
    assert "".join(pieces) == said
    assert "🦊" in pieces


def test_any_bytes_come_out_as_decoded_at_once(tokenizer):
    chance = random.Random(0)
    for _ in range(50):
        tokens = [chance.randrange(len(tokenizer)) for _ in range(60)]
        assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("said", "stops", "left"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "e t"], "on"),
        ("aab", ["ab"], "a"),
        ("aaab aab", ["aab "], "a"),
        ("no such thing", ["thingy"], "no such thing"),
        ("stop", ["stop"], ""),
    ],
)
def test_stop_strings(tokenizer, said, stops, left):
    pieces = stream(tokenizer, tokenizer(said)["input_ids"], stops)
    assert "".join(pieces) == left


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
    text = TextStream(tokenizer, ["END"])
    pieces = [text.push(token) for token in tokenizer("xENxEND")["input_ids"]]
    assert pieces == ["x", "", "", "ENx", "", "", ""]
    assert text.stopped


@pytest.mark.parametrize(
    ("said", "stops", "left"),
    [
        ("one<|im_end|>two", ["<|im_end|>"], "one"),
        ("one<|im_start|>user two", ["<|im_start|>user"], "one"),
        ("one<|im_start|>assistant", ["<|im_start|>user"], "oneassistant"),
        ("one<|im_end|>", ["ne<|im_end|>"], "o"),
        ("one<|im_end|><|im_start|>two", ["nothing"], "onetwo"),
        ("<|im_end|>", ["<|im_end|>"], ""),
    ],
)
def test_stop_strings_match_control_tokens_which_are_no_text(tokenizer, said, stops, left):
    assert "".join(stream(tokenizer, tokenizer(said)["input_ids"], stops)) == left
