"""From prompt text to ids.

What users typed stays text, placeholders grow to one a media token, answers are marked.
Marks are private-use characters that travel through the chat template and are gone after :func:`tokenize`:

    user text with a typed control token    what does <image> mean  ->  what does \\ue000<image>\\ue001 mean
    an assistant's words                    A fox.                  ->  \\ue002A fox.\\ue003
"""

import re

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

TYPED, TYPED_END, ANSWER, ANSWER_END = "\ue000", "\ue001", "\ue002", "\ue003"
_MARKS = re.compile(f"[{TYPED}-{ANSWER_END}]")


def unmark(text: str) -> str:
    """``text`` without marks."""
    return _MARKS.sub("", text)


def control_pattern(tokenizer) -> re.Pattern:
    """Matches every control token of the tokenizer, and the placeholders."""
    tokens = {*_special(tokenizer).values(), *PLACEHOLDERS.values()}
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _special(tokenizer) -> dict[int, str]:
    """Every control token of the tokenizer, named ones (such as eos) and others."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def mark_typed(text: str, control: re.Pattern) -> str:
    """User text in which control tokens are marked as characters that somebody typed."""
    return control.sub(lambda match: f"{TYPED}{match.group()}{TYPED_END}", unmark(text))


def tokenize(text: str, tokenizer, counts: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Ids of a marked prompt and, for each id, whether the assistant said it (1) or not (0).

    Args:
        text: prompt with marks.
        tokenizer: a fast tokenizer (offsets are needed) that has the placeholders as special tokens.
        counts: for each medium the number of tokens of each of its items, in order.

    The control token that follows an answer, blanks aside, ends the turn and counts as said.
    """
    remaining = {
        tokenizer.convert_tokens_to_ids(PLACEHOLDERS[kind]): list(items) for kind, items in counts.items()
    }
    special = _special(tokenizer)
    ids: list[int] = []
    said: list[int] = []
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
            ids += [token] * repeat
            said += [int(any(inside[start:end]) or ends_turn)] * repeat
        answering = inside[-1]
    return ids, said


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
