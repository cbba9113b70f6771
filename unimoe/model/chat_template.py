"""Token ids of prompts, by the chat template.

What users typed stays text, placeholders expand to one for each media token, answers are marked.
Marks are private-use characters that pass through the chat template and are removed by :func:`tokenize`:

    user text with a typed control token    what does <image> mean  ->  what does \\ue000<image>\\ue001 mean
    an assistant's words                    A fox.                  ->  \\ue002A fox.\\ue003
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from unimoe.errors import UserError

from .configuration import PLACEHOLDERS

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Template for LLMs that come without one, and for the embedded default, whose own puts a system turn before
every chat."""

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

VICUNA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}{{ eos_token }}"
    "{% else %}"
    "{% if message['role'] == 'user' %}USER: {% endif %}{{ message['content'] }}{{ ' ' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Template of Vicuna 1.1 and later, LLaVA-1.5 and Uni-MoE (``vicuna_v1``)."""

TYPED, TYPED_END, ANSWER, ANSWER_END, BREAK = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004"
_MARKS = re.compile(f"[{TYPED}-{BREAK}]")
_ANSWERS = re.compile(f"{ANSWER}(.*?){ANSWER_END}", re.DOTALL)
_OTHER = "choose another chat_template, such as chatml"


@dataclass
class Tokens:
    """A tokenized prompt."""

    ids: list[int] = field(default_factory=list)
    """[T]"""
    said: list[int] = field(default_factory=list)
    """[T], 1 on what the assistant said and on the token that ends its turn."""
    ends: list[int] = field(default_factory=list)
    """The ids of the tokens that end the assistant's turns."""


def unmark(text: str) -> str:
    """``text`` without marks."""
    return _MARKS.sub("", text)


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches every control token of the tokenizer, and the placeholders."""
    tokens = {*_special(tokenizer).values(), *PLACEHOLDERS.values()}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _special(tokenizer: Any) -> dict[int, str]:
    """Every control token of the tokenizer, named ones (such as eos) and others."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def mark_typed(text: str, control: re.Pattern[str]) -> str:
    """User text in which control tokens are marked as characters that somebody typed."""
    return control.sub(lambda match: f"{TYPED}{match.group()}{TYPED_END}", unmark(text))


def mark_answer(text: str) -> str:
    """An assistant's words, marked."""
    return f"{ANSWER}{text.strip()}{ANSWER_END}"


def tokenize(text: str, tokenizer: Any, counts: dict[str, list[int]]) -> Tokens:
    """Ids of a marked prompt, and which of them the assistant said.

    Args:
        text: prompt with marks.
        tokenizer: a fast tokenizer (offsets are needed) that has the placeholders as special tokens.
        counts: for each modality the number of tokens of each of its items, in order.

    The control token that follows an answer, blanks aside, ends the turn and counts as said.
    """
    remaining = {
        tokenizer.convert_tokens_to_ids(PLACEHOLDERS[modality]): list(items)
        for modality, items in counts.items()
    }
    special = _special(tokenizer)
    tokens = Tokens()
    answering = False
    for index, piece in enumerate(re.split(f"{TYPED}(.*?){TYPED_END}", text)):
        typed = index % 2 == 1  # the pattern's group: every other piece
        clean, inside, ends = _answers(piece, answering)
        encoded = tokenizer(
            clean, add_special_tokens=False, split_special_tokens=typed, return_offsets_mapping=True
        )
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ends_turn = token in special and any(at <= start and not clean[at:start].strip() for at in ends)
            repeat = remaining[token].pop(0) if not typed and token in remaining else 1
            tokens.ids += [token] * repeat
            tokens.said += [int(any(inside[start:end]) or ends_turn)] * repeat
            tokens.ends += [token] * ends_turn
        answering = inside[-1]
    return tokens


def opening_settings(apply: Callable[[str | None, bool, dict[str, bool]], str]) -> dict[str, bool] | None:
    """What a chat template is called with, so that an answer stands behind the same opening when it is
    learned as when it is asked for; None if nothing does that.

    Templates of thinking models may put an empty thought before an answer, in one of the two only.

    Args:
        apply: renders a question and, unless it is None, the answer given as text; the flag adds the opening
            of an answer, and the settings go to the template.
    """
    try:
        if apply(None, True, {}) == apply(None, False, {}):
            return {}  # it has no opening for answers
        for settings in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            opening = apply(mark_answer("a"), False, settings).partition(ANSWER)[0]
            if opening.rstrip() == apply(None, True, settings).rstrip():
                return settings
    except (TemplateError, TypeError, ValueError):
        return {}  # it refuses this probe; what it does with real conversations is seen then
    return None


OPENS_OTHERWISE = (
    "the chat template opens an answer in another way when the model is asked than in what it learns from; "
    "choose another chat_template, such as chatml"
)


def check_answers(text: str, answers: list[str], where: str) -> None:
    """See that a chat template left every answer as it was.

    Args:
        text: the rendered conversation, with marks.
        answers: what the template was given, marked as by :func:`mark_answer`.
        where: what errors begin with.

    Raises:
        UserError: an answer is missing, is changed, or is there twice.
    """
    found = [mark_answer(answer) for answer in _ANSWERS.findall(text)]
    if found == answers:
        return
    for answer in answers:
        if found.count(answer) < answers.count(answer):
            kept = unmark(answer)[-40:]
            raise UserError(f"{where}: the chat template drops or rewrites the answer '...{kept}'; {_OTHER}")
    counts = f"writes {len(found)} answers, the conversation has {len(answers)}"
    raise UserError(f"{where}: the chat template {counts}; {_OTHER}")


def check_learned(tokens: Tokens, tokenizer: Any, text: str, where: str) -> None:
    """See that the tokens which are learned decode to the answers of ``text`` and to their ends.

    Raises:
        UserError: they do not, or a turn ends with something that is no control token, so that a model would
            not learn to stop.
    """
    answers = _ANSWERS.findall(text)
    if len(tokens.ends) < len(answers):
        control = tuple(_special(tokenizer).values())
        after = [unmark(rest.partition(ANSWER)[0]) for rest in text.split(ANSWER_END)[1:]]
        found = next((rest for rest in after if not rest.lstrip().startswith(control)), after[0])
        raise UserError(
            f"{where}: the chat template ends an answer with {found[:20]!r}, which begins with no control "
            f"token of the tokenizer, so that the model would not learn to stop; {_OTHER}"
        )
    learned = [token for token, said in zip(tokens.ids, tokens.said, strict=True) if said]
    others = {tokenizer.unk_token_id, *tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS.values()))}
    if not others.isdisjoint(learned):
        return  # characters that the vocabulary lacks, or media
    decoded, at = _letters(tokenizer.decode(learned)), 0
    for answer in map(_letters, map(unmark, answers)):
        at = decoded.find(answer, at)
        if at < 0:
            raise UserError(f"{where}: the tokens of the answer decode to {decoded[:60]!r}; {_OTHER}")
        at += len(answer)


def _letters(text: str) -> str:
    """What tokenizers leave of a text: blanks, case and composed characters may change."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _answers(piece: str, answering: bool) -> tuple[str, list[bool], set[int]]:
    """The piece without marks; whether each of its characters, and its end, is in an answer; where answers
    end."""
    clean: list[str] = []
    inside: list[bool] = []
    ends: set[int] = set()
    for character in piece:
        if character == ANSWER:
            answering = True
        elif character == ANSWER_END:
            answering = False
            ends.add(len(clean))
        else:
            clean.append(character)
            inside.append(answering)
    return "".join(clean), [*inside, answering], ends
