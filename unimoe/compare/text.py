"""Plain text as the data of a comparison: windows of tokens, and losses in bits per byte.

Shapes: B rows, T tokens of a row.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from unimoe.data.read import spread
from unimoe.errors import UserError
from unimoe.model.inputs import Batch

from .base import Base
from .config import CompareConfig
from .data import Step, parts

KEPT = 2**30
"""Bytes of the trunk's output that are kept; later steps run the trunk again for every design."""


class Texts:
    """Windows of plain text."""

    unit, has_answers = "bits per byte", False

    def __init__(self, config: CompareConfig, base: Base):
        """
        Raises:
            UserError: a file is missing, not text, or shorter than a window.
        """
        self.config, self.tokenizer = config, base.processor.tokenizer
        self.tokens_per_byte: dict[str, float] = {}
        self.pools = [self._tokens(file)[0] for file in config.data.train_files]
        self.trunk = base.trunk
        self._batches: dict[int, Step] = {}
        """Batches above the trunk, of the steps of one seed, which all designs of the seed share."""
        self._seed: int | None = None
        self._evaluation: dict[str, list[Step]] = {}
        self.held: dict[str, Tensor] = {}
        for named in config.data.eval_files.values():
            for name, file in named.items():
                self.held[name], self.tokens_per_byte[name] = self._tokens(file)

    def _tokens(self, file: str) -> tuple[Tensor, float]:
        """The tokens of a file, and how many there are for each byte of it."""
        text, tokenizer = read_text(file), self.tokenizer
        ids: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        count, least = len(ids["input_ids"]), self.config.data.length + 1
        if count < least:
            raise UserError(f"{file} has {count} tokens, expected {least} or more (data.length and one)")
        return torch.tensor(ids["input_ids"]), count / len(text.encode())

    def train(self, seed: int, steps: int) -> Iterable[Step]:
        if seed != self._seed:
            self._seed, self._batches = seed, {}
        windows = _Windows(self.pools, self.config, seed, steps)
        return DataLoader(_AboveTrunk(windows, self), batch_size=None, sampler=range(steps))

    def batch(self, step: int, windows: "_Windows") -> Step:
        """Batch of a step; through the trunk, where there is one, unless it is known."""
        if self.trunk is None:
            return windows[step]
        if step not in self._batches:
            batch = self._above(windows[step])
            whole = batch[0]
            assert "inputs_embeds" in whole
            if (len(self._batches) + 1) * whole["inputs_embeds"].nbytes > KEPT:
                return batch
            self._batches[step] = batch
        return self._batches[step]

    def _above(self, batch: Step) -> Step:
        """The batch with the trunk's output, where there is a trunk."""
        if self.trunk is None:
            return batch
        return [{**one, "inputs_embeds": self.trunk.states(one)} for one in batch]

    def evaluation(self, split: str) -> dict[str, list[Step]]:
        length, data = self.config.data.length, self.config.data
        found = {}
        for name in data.eval_files[split]:
            ids = self.held[name]
            starts = spread(range(0, len(ids) - length, length), data.eval_samples)
            windows = [ids[start : start + length + 1] for start in starts]
            if name not in self._evaluation:
                batches = [[batch_of(part)] for part in parts(windows, self.config.rows)]
                self._evaluation[name] = [self._above(batch) for batch in batches]
            found[name] = self._evaluation[name]
        return found

    def loss(self, name: str, nats: float) -> float:
        return nats / math.log(2) * self.tokens_per_byte[name]

    def kind(self, name: str) -> str | None:
        return name


class _Windows(Dataset):
    """Step -> batch of random windows, a function of the seed and the step alone."""

    def __init__(self, pools: Sequence[Tensor], config: CompareConfig, seed: int, steps: int):
        self.pools, self.rows, self.length = pools, config.rows, config.data.length
        self.counts, self.seed, self.steps = config.data.counts, seed, steps
        shares = np.array(config.data.shares or [len(ids) for ids in pools], dtype=float)
        self.shares = shares / shares.sum()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Step:
        random = np.random.default_rng((self.seed, step))
        if self.counts is None:
            chosen = random.choice(len(self.pools), self.rows, p=self.shares)
        else:
            chosen = np.repeat(np.arange(len(self.pools)), self.counts)
        windows = []
        for pool in chosen.tolist():
            start = int(random.integers(len(self.pools[pool]) - self.length))
            windows.append(self.pools[pool][start : start + self.length + 1])
        return [batch_of(windows)]


class _AboveTrunk(Dataset):
    """Step -> batch, as :meth:`Texts.batch` gives it."""

    def __init__(self, windows: _Windows, texts: Texts):
        self.windows, self.texts = windows, texts

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, step: int) -> Step:
        return self.texts.batch(step, self.windows)


def batch_of(windows: Sequence[Tensor]) -> Batch:
    """Windows [T] of one length as a batch [B, T] that learns every token after the first."""
    ids_BT = torch.stack(list(windows))
    return {"input_ids": ids_BT, "labels": ids_BT}


def read_text(file: str) -> str:
    """The text of a file: UTF-8, or the ``text`` of each line of a ``.jsonl``, with empty lines in between.

    Raises:
        UserError: it cannot be read, or holds no text.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
        if file.endswith(".jsonl"):
            text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        expected = 'lines of {"text": ...}' if file.endswith(".jsonl") else "text in UTF-8"
        raise UserError(f"{file}: expected {expected} ({error})") from error
    if not text.strip():
        raise UserError(f"{file} holds no text")
    return text
