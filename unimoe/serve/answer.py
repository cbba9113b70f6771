"""The state of one answer: it samples its tokens, decodes them, and decides when to stop.

Shapes: V vocabulary, T tokens of prompt and answer so far.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from unimoe.compress.decoding import Decoding
from unimoe.inference.engines import AnsweringModel
from unimoe.model.generation import end_tokens, logits_processors

from .text import TextStream


@dataclass(frozen=True)
class Choice:
    """A sampled token and its most probable alternatives."""

    token: int
    logprob: float
    """Natural logarithm of its probability, before temperature and top-p."""
    top: list[tuple[int, float]]
    """The most probable tokens with their log-probabilities, as many as were requested."""


@dataclass(frozen=True)
class Delta:
    """What an answer adds to what its client has already received."""

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    """One per token since the last delta, if log-probabilities were requested."""
    finish_reason: str | None = None
    """``stop``, ``length`` or ``cancelled`` in the last delta."""
    error: Exception | None = None
    """Why the answer failed, in the last delta."""


@dataclass(frozen=True)
class SamplingParams:
    """How to generate one answer."""

    generation: GenerationConfig
    """Logits processors, sampling or greedy, and ``max_new_tokens``."""
    seed: int | None = None
    """Seed of the sampling; None for a different answer each time."""
    stops: list[str] = field(default_factory=list)
    """Strings that end the answer; they are not part of it."""
    logprobs: int | None = None
    """Alternatives to report for each token; None for no log-probabilities at all."""


class Answer:
    """State of one answer.

    Args:
        model: for its logits processors.
        tokenizer: of the model.
        inputs: the prompt from ``processor.pad``, a batch of one row.
        sampling: how to generate it.
        on_delta: called with each Delta, on the engine's thread.
        decoding: how experts are skipped, contrasted or rewired; None changes nothing.
    """

    def __init__(
        self,
        model: AnsweringModel,
        tokenizer: Any,
        inputs: Mapping[str, Any],
        sampling: SamplingParams,
        on_delta: Callable[[Delta], None],
        decoding: Decoding | None = None,
    ) -> None:
        self.inputs = inputs
        self.decoding = decoding or Decoding()
        self.on_delta = on_delta
        self.prompt_tokens: int = inputs["input_ids"].shape[1]
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.cancelled = False
        """Set from any thread; the engine drops the answer before its next step."""
        self.longest: int = sampling.generation.max_new_tokens or 1
        self._text = TextStream(tokenizer, sampling.stops)
        self._sampling = sampling
        self._process = logits_processors(model, sampling.generation, self.prompt_tokens)
        self._generator = torch.Generator(model.device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)
        self._ends = set(end_tokens(model.generation_config))
        self._choices: list[Choice] = []

    def take(self, logits_V: Tensor) -> None:
        """Sample the next token and report what it adds. Sets ``finish_reason`` if it is the last."""
        logits_V = logits_V.float()
        token = self._choose(logits_V)
        self.tokens.append(token)
        text = ""
        if token in self._ends:
            self.finish_reason = "stop"
        else:
            text = self._text.push(token)
            if self._sampling.logprobs is not None:
                self._choices.append(_describe(token, logits_V, self._sampling.logprobs))
            if len(self.tokens) >= self.longest:
                self.finish_reason = "length"
        if self.finish_reason and not self._text.stopped:
            text += self._text.end()
        if self._text.stopped:
            self.finish_reason = "stop"
        if text or self.finish_reason:
            self.on_delta(Delta(text, self._choices, self.finish_reason))
            self._choices = []

    def cancel(self) -> None:
        """Request a stop; the engine drops the answer before its next step."""
        self.cancelled = True

    def end(self, delta: Delta) -> None:
        """End without a further token: cancelled, or by an error."""
        self.finish_reason = delta.finish_reason or "error"
        self.on_delta(delta)

    def _choose(self, logits_V: Tensor) -> int:
        prompt_1T = self.inputs["input_ids"].to(logits_V.device)
        ids_1T = torch.cat([prompt_1T, prompt_1T.new_tensor([self.tokens])], 1)  # integers, also of no token
        scores_V = self._process(ids_1T, logits_V[None])[0]  # type: ignore[arg-type]
        if not self._sampling.generation.do_sample:
            return int(scores_V.argmax())
        return int(torch.multinomial(scores_V.softmax(-1), 1, generator=self._generator))


def _describe(token: int, logits_V: Tensor, alternatives: int) -> Choice:
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(alternatives)
    return Choice(
        token, float(logprobs_V[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    )
