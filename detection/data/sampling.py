"""Prompts of training images: the classes that an image shows, and some that it does not.

Shapes: M objects of an image.

With early fusion a model comes to believe the prompt; absent names teach it that asking does not mean being
there (Grounding DINO 1.5, arXiv 2405.10300, section 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unimoe.detection.model.prompt import MAX_TOKENS, Prompt, check_names, class_prompts, token_counts


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
    """Draws a prompt for the objects of one image, from torch's global generator.

    A class of several names ("pen/pencil") is asked for by one of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        config: SamplingConfig | None = None,
    ):
        """
        Args:
            names: of the classes.
            tokenizer: the detector's.
            config: how many absent names a prompt has.

        Raises:
            UserError: the tokenizer does not know a name, or does not tell two apart.
        """
        self.tokenizer = tokenizer
        self.config = config or SamplingConfig()
        self.alternatives = class_prompts(names)
        flat = [name for names in self.alternatives for name in names]
        check_names(flat, tokenizer)
        self.tokens = dict(zip(flat, token_counts(flat, tokenizer), strict=True))

    def __call__(
        self,
        category_M: Tensor,
        absent: Sequence[int] | None = None,
        present: Sequence[int] = (),
        hidden: Sequence[int] = (),
    ) -> tuple[Prompt, Tensor]:
        """(the prompt, [M] int64: each object's name in it, -1 where its class did not fit).

        The prompt is empty where every class may be there.

        Args:
            category_M: the class of each object, a row of ``names``.
            absent: classes known not to be there (default: all but those of the objects).
            present: further classes that are there, such as those of crowds; never asked for as absent.
            hidden: classes whose objects were cut off by a crop; asked for as absent where nothing else is.
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
        if not asked:  # a prompt should ask for something, but for nothing that may be there
            rest = [row for row in range(len(self.alternatives)) if row not in known]
            rows = pool or sorted(set(hidden) - known) or rest
            if not rows:
                return Prompt.empty(self.tokenizer), torch.full(category_M.shape, -1, dtype=torch.int64)
            row = rows[int(torch.randint(len(rows), ()))]
            asked[row] = self.alternatives[row][0]
        order = [list(asked)[place] for place in torch.randperm(len(asked)).tolist()]
        name_of = {row: place for place, row in enumerate(order)}
        names_M = torch.tensor([name_of.get(row, -1) for row in category_M.tolist()], dtype=torch.int64)
        prompt = Prompt.from_names([asked[row] for row in order], self.tokenizer, config.max_tokens)
        return prompt, names_M
