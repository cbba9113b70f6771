"""Text prompts: names or a caption as tokens, in segments that do not attend to one another.

Shapes: L tokens, C names (or phrases), B prompts.

A prompt is ``[CLS] cat . red car . [SEP]``. Tokens attend only within their segment (a name and its full
stop), and position ids restart in each: the sub-sentence representation of Grounding DINO (arXiv 2303.05499,
section 3.4). So the text features of a name do not depend on the other names.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unimoe.errors import UserError

logger = logging.getLogger(__name__)

MAX_TOKENS = 256
"""Maximum prompt length of Grounding DINO, including the special tokens."""


@dataclass
class Prompt:
    """One prompt."""

    names: list[str]
    """The cleaned names; row c of ``name_tokens`` belongs to name c."""
    input_ids: Tensor
    """[L] int64."""
    position_ids: Tensor
    """[L] int64, position within the segment."""
    attention_mask: Tensor
    """[L, L] bool, True inside a segment."""
    name_tokens: Tensor
    """[C, L] bool, the tokens of each name without its full stop."""

    @classmethod
    def from_names(
        cls, names: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int = MAX_TOKENS
    ) -> "Prompt":
        """A prompt that asks for each of ``names``.

        Raises:
            UserError: there are no names, one is empty or unknown to the tokenizer, or they have more than
                ``max_tokens`` tokens (``chunk_names`` splits a long list).
        """
        cleaned, tokens = _tokenize(names, tokenizer)
        first, last = _special_ids(tokenizer)
        stop = _stop_ids(tokenizer)
        ids, segments = list(first), [0] * len(first)
        spans = []
        for segment, name in enumerate(tokens, 1):
            spans.append((len(ids), len(ids) + len(name)))
            ids += name + stop
            segments += [segment] * (len(name) + len(stop))
        ids, segments = ids + last, segments + [len(tokens) + 1] * len(last)
        if len(ids) > max_tokens:
            raise UserError(
                f"the prompt's {len(names)} names have {len(ids)} tokens, expected at most {max_tokens}; "
                "ask for fewer at a time"
            )
        place_L = torch.arange(len(ids))
        rows = [(place_L >= start) & (place_L < end) for start, end in spans]
        return cls(cleaned, *_structure(ids, segments), torch.stack(rows))

    @classmethod
    def empty(cls, tokenizer: PreTrainedTokenizerBase) -> "Prompt":
        """A prompt without names, special tokens only: for an image of which no class is known to be present
        or absent."""
        first, last = _special_ids(tokenizer)
        ids = first + last or _stop_ids(tokenizer)
        segments = list(range(len(ids)))
        return cls([], *_structure(ids, segments), torch.zeros(0, len(ids), dtype=torch.bool))

    @classmethod
    def from_caption(
        cls,
        caption: str,
        spans: Sequence[Sequence[tuple[int, int]]],
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int = MAX_TOKENS,
    ) -> "Prompt":
        """A sentence, unchanged; phrase c consists of the characters in ``spans[c]`` (start, end).

        Segments end at full stops and question marks. Tokens beyond ``max_tokens`` are truncated; a phrase
        that loses all of its tokens keeps an empty row in ``name_tokens``.

        Raises:
            UserError: the caption has no tokens.
        """
        lowered = caption.lower()
        text = lowered if len(lowered) == len(caption) else caption  # spans count characters
        text = text.rstrip()
        text = text if text.endswith((".", "?")) else text + " ."
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first, last = _special_ids(tokenizer)
        room = max_tokens - len(first) - len(last)
        body, offsets = encoded["input_ids"][:room], encoded["offset_mapping"][:room]
        if not body:
            raise UserError("the caption has no tokens, expected a sentence")
        ends = {_stop_ids(tokenizer, mark)[-1] for mark in (".", "?")}
        segments, segment = [0] * len(first), 1
        for token in body:
            segments.append(segment)
            segment += token in ends
        ids, segments = first + body + last, segments + [segment + 1] * len(last)
        name_tokens = torch.zeros(len(spans), len(ids), dtype=torch.bool)
        for row, parts in enumerate(spans):
            for start, end in parts:
                for place, (begin, stop) in enumerate(offsets, len(first)):
                    name_tokens[row, place] |= begin < end and stop > start
        names = [" ".join(caption[start:end] for start, end in parts) for parts in spans]
        return cls(names, *_structure(ids, segments), name_tokens)


@dataclass
class PromptBatch:
    """Prompts, padded to the longest."""

    input_ids: Tensor
    """[B, L] int64."""
    text_mask: Tensor
    """[B, L] bool, True on real tokens."""
    text_attention_mask: Tensor
    """[B, L, L] bool, True inside a segment; a padding token attends to itself."""
    text_position_ids: Tensor
    """[B, L] int64."""
    name_tokens: list[Tensor]
    """Tokens of each name, for each prompt [C, L] bool."""

    @classmethod
    def stack(cls, prompts: Sequence[Prompt]) -> "PromptBatch":
        longest = max(len(prompt.input_ids) for prompt in prompts)
        rows, alone = len(prompts), torch.eye(longest, dtype=torch.bool)
        batch = cls(
            torch.zeros(rows, longest, dtype=torch.int64),
            torch.zeros(rows, longest, dtype=torch.bool),
            alone.repeat(rows, 1, 1),
            torch.zeros(rows, longest, dtype=torch.int64),
            [],
        )
        for row, prompt in enumerate(prompts):
            length = len(prompt.input_ids)
            batch.input_ids[row, :length] = prompt.input_ids
            batch.text_mask[row, :length] = True
            batch.text_attention_mask[row, :length, :length] = prompt.attention_mask
            batch.text_position_ids[row, :length] = prompt.position_ids
            batch.name_tokens.append(torch.nn.functional.pad(prompt.name_tokens, (0, longest - length)))
        return batch

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model's ``forward``."""
        names = ("input_ids", "text_mask", "text_attention_mask", "text_position_ids")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> "PromptBatch":
        moved = {name: tensor.to(device) for name, tensor in self.inputs().items()}
        return PromptBatch(**moved, name_tokens=[rows.to(device) for rows in self.name_tokens])


def clean_name(name: str, brackets: bool = False) -> str:
    """Convert a name to lower case, with underscores as spaces, without brackets and their content, invisible
    characters and a final full stop ("Truck_(pickup)" -> "truck"). ``brackets`` keeps the words inside
    brackets."""
    visible = "".join(
        " " if char.isspace() else char
        for char in name.replace("_", " ")
        if char.isspace() or unicodedata.category(char) not in ("Cc", "Cf")
    )
    visible = re.sub(r"[()]" if brackets else r"\([^)]*\)", " ", visible)
    return " ".join(visible.lower().split()).rstrip(" .")


def distinct_names(names: Sequence[str]) -> list[str]:
    """The cleaned names; names that would be equal keep the words in their brackets ("bow_(weapon)" and
    "bow_(ribbon)" -> "bow weapon" and "bow ribbon")."""
    cleaned = [clean_name(name) for name in names]
    counts = Counter(cleaned)
    return [
        clean_name(name, brackets=True) if counts[short] > 1 and short else short
        for name, short in zip(names, cleaned, strict=True)
    ]


def class_prompts(names: Sequence[str]) -> list[list[str]]:
    """The names of each class in prompts: evaluation uses the first, training any. No two classes share one.

    Objects365 writes alternatives as "pen/pencil". A slash inside a unit ("A/C unit", "1/2 inch bolt") is
    part of the name: it has a part of fewer than two letters.
    """
    whole = distinct_names(names)
    parts = []
    for name in whole:
        found = [part.strip() for part in name.split("/")]
        apart = all(sum(char.isalpha() for char in part) > 1 for part in found)
        parts.append(list(dict.fromkeys(found)) if apart else [name])
    counts = Counter(part for own in parts for part in own)
    return [
        own if all(counts[part] == 1 for part in own) else [name]
        for name, own in zip(whole, parts, strict=True)
    ]


def check_names(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer knows and distinguishes the names; names that it knows in part are logged.

    Raises:
        UserError: it does not, so that labels of detections would be arbitrary.
    """
    _, tokens = _tokenize(names, tokenizer)
    seen: dict[tuple[int, ...], str] = {}
    for name, ids in zip(names, tokens, strict=True):
        other = seen.setdefault(tuple(ids), name)
        if other != name:
            raise UserError(
                f"the names {other!r} and {name!r} are the same to the model; ask for one of them"
            )
        if tokenizer.unk_token_id in ids:
            logger.warning(
                "the model's vocabulary lacks a part of the name %r; its detections may be wrong", name
            )


def chunk_names(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int = MAX_TOKENS,
    max_names: int | None = None,
) -> list[list[int]]:
    """Indices of ``names``, in order, in chunks that each fit into one prompt.

    ``max_names`` also limits the number of names in a chunk (40 is usual for LVIS).

    Raises:
        UserError: a single name is too long.
    """
    first, last = _special_ids(tokenizer)
    room = max_tokens - len(first) - len(last)
    chunks: list[list[int]] = [[]]
    used = 0
    for index, need in enumerate(token_counts(names, tokenizer)):
        if need > room:
            raise UserError(f"name {index} has {need} tokens, expected at most {room}: {names[index][:60]!r}")
        if used + need > room or len(chunks[-1]) == max_names:
            chunks.append([])
            used = 0
        chunks[-1].append(index)
        used += need
    return chunks


def token_counts(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Number of prompt tokens of each name, including its full stop."""
    _, tokens = _tokenize(names, tokenizer)
    stop = len(_stop_ids(tokenizer))
    return [len(name) + stop for name in tokens]


def _tokenize(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[list[int]]]:
    """The cleaned names, and the tokens of each.

    Raises:
        UserError: there is no name, or one is empty or unknown.
    """
    if isinstance(names, str) or not names:
        raise UserError("the prompt names nothing to look for, expected at least one name")
    cleaned = distinct_names(names)
    if not all(cleaned):
        index = cleaned.index("")
        raise UserError(f"name {index} of the prompt is empty: {names[index]!r}")
    tokens = tokenizer(cleaned, add_special_tokens=False)["input_ids"]
    for index, ids in enumerate(tokens):
        if all(id == tokenizer.unk_token_id for id in ids):
            raise UserError(
                f"name {index} of the prompt, {names[index]!r}, is unknown to the model's vocabulary; "
                "expected words of a language that its text encoder was trained on"
            )
    return cleaned, tokens


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Special tokens before and after the text; empty for a tokenizer without any."""
    first: Any = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last: Any = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    return [first] * (first is not None), [last] * (last is not None)


def _stop_ids(tokenizer: PreTrainedTokenizerBase, mark: str = ".") -> list[int]:
    ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"the tokenizer has no token for {mark!r}, expected one that ends a phrase")
    return ids


def _structure(ids: list[int], segments: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids [L], position_ids [L], attention_mask [L, L]) of tokens with ascending segment numbers."""
    segment_L = torch.tensor(segments)
    same_LL = segment_L[:, None] == segment_L
    start_L = same_LL.int().argmax(dim=1)
    return torch.tensor(ids), torch.arange(len(ids)) - start_L, same_LL
