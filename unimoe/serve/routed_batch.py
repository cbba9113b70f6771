"""A running batch whose rows may skip, contrast or rewire (:class:`unimoe.compress.decoding.Decoding`).

Rows with a contrast have a second row in a batch of their own, for the weak run. A row that shifts the
routers is alone: training the shifts stops all others, and its whole context is read anew.

Shapes: B rows, V vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from unimoe.compress import rewire
from unimoe.compress.contrast import contrast_logits, weak
from unimoe.compress.decoding import Decoding, extend, routed
from unimoe.model.utils import to_device
from unimoe.moe.records import unrecorded
from unimoe.moe.view import find_layers

from .batch import Prompt, RunningBatch, StockPrompt


class RoutedPrompt:
    """Prefill of a row, and of its second row for the weak run."""

    def __init__(self, batch: "RoutedBatch", inputs: Mapping[str, Any], decoding: Decoding):
        self.batch, self.decoding = batch, decoding
        self.inputs = {name: to_device(value, batch.model.device) for name, value in inputs.items()}
        self.strong = batch.strong.prompt(self.inputs)
        self.weak: Prompt | StockPrompt | None = None
        if decoding.contrast:
            self.weak = copy.copy(self.strong)  # with the same encoded media
            self.weak.cache = DynamicCache(config=batch.model.config)
        self.shifts: rewire.Shifts | None = None
        self.tokens: list[int] = []
        """Tokens of the answer since the shifts were trained."""

    def advance(self, tokens: int) -> tuple[int, Tensor | None]:
        """Run more tokens as :meth:`unimoe.serve.batch.Prefill.advance` does; the first call trains the
        shifts."""
        if self.decoding.rewire and self.shifts is None:
            self._rewire()
        with self.shifted():
            with routed(self.batch.layers, [self.decoding]):
                read, strong_V = self.strong.advance(tokens)
            if self.weak is None:
                return read, strong_V
            with weak(self.batch.layers), unrecorded():
                _, weak_V = self.weak.advance(tokens)
        if strong_V is None or weak_V is None:
            return read, None
        return read, self.batch.contrasted(strong_V[None], weak_V[None], [self])[0]

    def joined(self) -> None:
        """Let go of what the batches hold now: a prompt would keep the caches of the moment it joined."""
        del self.strong, self.weak
        if not self.decoding.rewire:  # which reads its context again
            self.inputs = {}

    def shifted(self) -> AbstractContextManager:
        """Inside, the routers are shifted, if this row asks for it."""
        return nullcontext() if self.shifts is None else self.shifts.applied()

    def continued(self) -> "RoutedPrompt":
        """The row as a prompt that holds its answer so far."""
        inputs = dict(self.inputs)
        new_1T = torch.tensor([self.tokens], device=self.batch.model.device)
        extend(inputs, new_1T, torch.ones_like(new_1T, dtype=torch.bool))
        return RoutedPrompt(self.batch, inputs, self.decoding)

    def _rewire(self) -> None:
        model, layers = self.batch.model, self.batch.layers
        with routed(layers, [self.decoding]), rewire.no_other_gradients(model), unrecorded():
            loss = rewire.context_loss(model, self.inputs)
            self.shifts = rewire.train(layers, 1, loss, self.decoding.rewire)


class RoutedBatch:
    """A :class:`unimoe.serve.batch.RunningBatch` with settings for each row."""

    def __init__(self, model: Any):
        self.model = model
        self.strong, self.weak = RunningBatch(model), RunningBatch(model)
        self.rows: list[RoutedPrompt] = []
        self.layers = find_layers(model)
        settings = model.generation_config
        self.suppressed: list[int] = list(getattr(settings, "suppress_tokens", None) or [])

    def prompt(self, inputs: Mapping[str, Any], decoding: Decoding) -> RoutedPrompt:
        """Encode the media of a prompt, a batch of one row."""
        return RoutedPrompt(self, inputs, decoding)

    def join(self, prompt: RoutedPrompt) -> None:
        """Add a row whose prompt is complete."""
        self.strong.join(prompt.strong)
        if prompt.weak is not None:
            self.weak.join(prompt.weak)
        prompt.joined()
        self.rows.append(prompt)

    def step(self, tokens: list[int]) -> Tensor:
        """Append one token to each row; the logits [B, V] of the next tokens."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.tokens.append(token)
        first = self.rows[0]
        if first.decoding.rewire and len(first.tokens) == rewire.BLOCK:
            return self._rewire(first)
        with first.shifted():  # a row with shifts is the only one
            with routed(self.layers, [row.decoding for row in self.rows]):
                strong_BV = self.strong.step(tokens)
            both = [index for index, row in enumerate(self.rows) if row.decoding.contrast]
            if not both:
                return strong_BV
            with weak(self.layers), unrecorded():
                weak_XV = self.weak.step([tokens[index] for index in both])
        strong_BV = strong_BV.float()
        rows = [self.rows[index] for index in both]
        strong_BV[both] = self.contrasted(strong_BV[both], weak_XV, rows)
        return strong_BV

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        both = [index for index, row in enumerate(self.rows) if row.decoding.contrast]
        self.weak.keep([both.index(row) for row in rows if row in both])
        self.strong.keep(rows)
        self.rows = [self.rows[row] for row in rows]

    def contrasted(self, strong_BV: Tensor, weak_BV: Tensor, rows: Sequence[RoutedPrompt]) -> Tensor:
        """[B, V] float32. Tokens that no answer may have are ruled out first, as in ``generate``: one of them
        could be the most probable."""
        strong_BV = strong_BV.float()
        strong_BV[:, self.suppressed] = -torch.inf
        beta_B1 = torch.tensor([[row.decoding.contrast] for row in rows], device=strong_BV.device)
        return contrast_logits(strong_BV, weak_BV.float(), beta_B1)

    def _rewire(self, row: RoutedPrompt) -> Tensor:
        again = row.continued()
        _, logits_V = again.advance(1 << 30)
        assert logits_V is not None, "all tokens were read at once"
        self.keep([])
        self.join(again)
        return logits_V[None]
