"""One answer in the making: it chooses its tokens, makes text of them, and knows when it ends.

Shapes: V vocabulary, T tokens of prompt and answer so far.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from unimoe.model.modeling import UniMoeForConditionalGeneration

from .text import TextStream


@dataclass(frozen=True)
class Choice:
    """A chosen token and what else was probable."""

    token: int
    logprob: float
    """Natural logarithm of the probability, before temperature and top-p."""
    top: list[tuple[int, float]]
    """The most probable tokens and their logarithms, as many as were asked for."""


@dataclass(frozen=True)
class Piece:
    """What an answer tells its client at a time."""

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    """One a token since the last piece, if log-probabilities were asked for."""
    finish_reason: str | None = None
    """``stop``, ``length`` or ``cancelled`` in the last piece."""
    error: Exception | None = None
    """Why there is no more."""


@dataclass(frozen=True)
class Wish:
    """How a client wants to be answered."""

    generation: GenerationConfig
    """Sampling, and ``max_new_tokens``."""
    seed: int | None = None
    """Of the random choices; None for different ones each time."""
    stops: list[str] = field(default_factory=list)
    """Strings that end the answer."""
    logprobs: int | None = None
    """How many alternatives to tell of each token; None for no log-probabilities at all."""


class Answer:
    """State of one answer.

    Args:
        model: for its logits processors.
        tokenizer: of the model.
        inputs: the prompt from ``processor.pad``, a batch of one row.
        wish: settings.
        tell: called with each Piece, on the engine's thread.
    """

    def __init__(
        self,
        model: UniMoeForConditionalGeneration,
        tokenizer: Any,
        inputs: Mapping[str, Any],
        wish: Wish,
        tell: Callable[[Piece], None],
    ):
        self.inputs = inputs
        self.tell = tell
        self.prompt_tokens: int = inputs["input_ids"].shape[1]
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.cancelled = False
        """Set from any thread; the engine drops the answer before its next step."""
        self.longest: int = wish.generation.max_new_tokens or 1
        self._text = TextStream(tokenizer, wish.stops)
        self._wish = wish
        self._process: Any = model._get_logits_processor(  # type: ignore[operator]
            wish.generation, device=str(model.device)
        )
        self._generator = torch.Generator(model.device)
        if wish.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(wish.seed % 2**63)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        self._ends = set(ends) if isinstance(ends, list) else {ends}
        self._choices: list[Choice] = []

    def take(self, logits_V: Tensor):
        """Choose the next token and tell what it adds. Sets ``finish_reason`` when it was the last."""
        logits_V = logits_V.float()
        token = self._choose(logits_V)
        self.tokens.append(token)
        text = ""
        if token in self._ends:
            self.finish_reason = "stop"
        else:
            text = self._text.push(token)
            if self._wish.logprobs is not None:
                self._choices.append(_describe(token, logits_V, self._wish.logprobs))
            if len(self.tokens) >= self.longest:
                self.finish_reason = "length"
        if self.finish_reason and not self._text.stopped:
            text += self._text.end()
        if self._text.stopped:
            self.finish_reason = "stop"
        if text or self.finish_reason:
            self.tell(Piece(text, self._choices, self.finish_reason))
            self._choices = []

    def cancel(self):
        """Stop as soon as the engine sees it."""
        self.cancelled = True

    def end(self, piece: Piece):
        """End without a further token: cancelled, or by an error."""
        self.finish_reason = piece.finish_reason or "error"
        self.tell(piece)

    def _choose(self, logits_V: Tensor) -> int:
        said_1T = torch.tensor([self.tokens], device=logits_V.device)
        ids_1T = torch.cat([self.inputs["input_ids"].to(logits_V.device), said_1T], 1)
        scores_V = self._process(ids_1T, logits_V[None])[0]
        if not self._wish.generation.do_sample:
            return int(scores_V.argmax())
        return int(torch.multinomial(scores_V.softmax(-1), 1, generator=self._generator))


def _describe(token: int, logits_V: Tensor, alternatives: int) -> Choice:
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(alternatives)
    return Choice(
        token, float(logprobs_V[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
