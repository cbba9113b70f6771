"""What a training picture is asked: the classes it shows, and some that it does not.

Shapes: M objects of an image.

With early fusion a model comes to believe the prompt; absent names teach it that asking does not mean being
there (Grounding DINO 1.5, arXiv 2405.10300, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unimoe.detection.model.prompt import MAX_TOKENS, Prompt, token_counts


@dataclass
class SamplingConfig:
    """MM-Grounding-DINO's scheme."""

    negatives: int = 85
    """Most absent names in a prompt."""
    full: float = 0.5
    """Share of the prompts that get that many; the others get a random number from 1."""
    max_tokens: int = MAX_TOKENS
    """Room of a prompt; present names come first."""


class PromptSampler:
    """Draws a prompt for the objects of one picture, from torch's global generator.

    A class called "a/b" (Objects365) is asked for by one of its names.
    """

    def __init__(self, names: Sequence[str], tokenizer: Any, config: SamplingConfig | None = None):
        self.tokenizer = tokenizer
        self.config = config or SamplingConfig()
        self.alternatives = [[part for part in name.split("/") if part.strip()] or [name] for name in names]
        flat = [name for names in self.alternatives for name in names]
        self.tokens = dict(zip(flat, token_counts(flat, tokenizer), strict=True))

    def __call__(
        self, category_M: Tensor, absent: Sequence[int] | None = None, present: Sequence[int] = ()
    ) -> tuple[Prompt, Tensor]:
        """(the prompt, [M] int64: each object's name in it, -1 where its class did not fit).

        Args:
            category_M: the class of each object, a row of ``names``.
            absent: classes known not to be there (default: all but those of the objects).
            present: further classes that are there, such as those of crowds; never asked for as absent.
        """
        config = self.config
        shown = set(category_M.tolist())
        known = shown | set(present)
        pool = [
            row for row in (range(len(self.alternatives)) if absent is None else absent) if row not in known
        ]
        wanted = config.negatives
        if torch.rand(()) >= config.full and wanted > 0:
            wanted = int(torch.randint(1, wanted + 1, ()))
        asked: dict[int, str] = {}
        room = config.max_tokens - 2
        for rows, most in ((sorted(shown), len(shown)), (pool, wanted)):
            taken = 0
            for place in torch.randperm(len(rows)).tolist():
                names = self.alternatives[rows[place]]
                name = names[int(torch.randint(len(names), ()))]
                if taken < most and self.tokens[name] <= room:
                    asked[rows[place]] = name
                    room -= self.tokens[name]
                    taken += 1
        if not asked:  # nothing is known to be there or absent, and a prompt must ask for something
            row = int(torch.randint(len(self.alternatives), ()))
            asked[row] = self.alternatives[row][0]
        order = [list(asked)[place] for place in torch.randperm(len(asked)).tolist()]
        name_of = {row: place for place, row in enumerate(order)}
        names_M = torch.tensor([name_of.get(row, -1) for row in category_M.tolist()], dtype=torch.int64)
        prompt = Prompt.from_names([asked[row] for row in order], self.tokenizer, config.max_tokens)
        return prompt, names_M
