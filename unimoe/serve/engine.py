"""One thread that runs the model for all answers: continuous batching.

    submit -> waiting -> chunked prefill -> a row of the running batch -> deltas, sent to the client

Rows join and leave between two steps. Prompts are prefilled a chunk at a time, so that a long one delays
neither the other answers nor a cancellation.
"""

import logging
import threading
from collections import deque
from dataclasses import dataclass

import torch

from unimoe.errors import UserError
from unimoe.inference.engines import AnsweringModel
from unimoe.inference.llama import LlamaBatch, LlamaModel
from unimoe.moe.few_rows import few_rows

from .answer import Answer, Delta
from .batch import Decoder, Prefill, can_batch
from .routed_batch import RoutedBatch

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class EngineConfig:
    """Limits on the work of an engine."""

    max_batch: int = 8
    """Answers decoded together."""
    max_queue: int = 32
    """Answers that wait for a slot in the batch; further requests receive 429."""
    max_cached_tokens: int = 32768
    """Positions in the KV cache, padding included; an answer that would exceed it waits until it is alone."""
    prefill_chunk: int = 256
    """Prompt tokens that are prefilled between two decoding steps."""

    def __post_init__(self):
        for name in vars(self):
            least = 0 if name == "max_queue" else 1
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, found {getattr(self, name)}")


class Engine:
    """Runs answers until :meth:`close`. All public methods are thread-safe."""

    def __init__(self, model: AnsweringModel, config: EngineConfig | None = None):
        self.model = model
        self.config = config or EngineConfig()
        self.max_batch = self.config.max_batch
        if self.max_batch > 1 and not can_batch(model):
            logger.warning(
                "this LLM's KV cache (sliding window, recurrence) cannot be batched; one request at a time"
            )
            self.max_batch = 1
        if isinstance(model, LlamaModel):
            self.max_batch = min(self.max_batch, model.llama.rows)
        self._places = self.max_batch + self.config.max_queue
        self._taken = 0
        self._waiting: deque[Answer] = deque()
        self._prefilling: tuple[Answer, Prefill] | None = None
        self._rows: list[Answer] = []
        self._batch: Decoder = LlamaBatch(model) if isinstance(model, LlamaModel) else RoutedBatch(model)
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="unimoe-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Answers without a first token yet."""
        return len(self._waiting) + (self._prefilling is not None)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self._thread.is_alive()

    def reserve(self):
        """Reserve a place for an answer.

        Raises:
            QueueFull: there is none, or the engine is closed.
        """
        with self._changed:
            if self._closed or self._taken >= self._places:
                raise QueueFull
            self._taken += 1

    def release(self):
        """Give back a reserved place for which no answer was submitted."""
        with self._changed:
            self._taken -= 1

    def submit(self, answer: Answer):
        """Run ``answer`` in a reserved place, which it gives back when it ends."""
        with self._changed:
            if self._closed:
                self._taken -= 1
                raise QueueFull
            self._waiting.append(answer)
            self._changed.notify()

    def close(self):
        """Cancel all answers and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self):
        with torch.inference_mode(), few_rows(self.model):
            while self._wait_for_work():
                self._drop_cancelled()
                self._prefill()
                self._step()
        for answer in self._all():
            self._end(answer, Delta(finish_reason="cancelled"))

    def _wait_for_work(self) -> bool:
        """Sleep while there is nothing to do. False once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._all())
            return not self._closed

    def _all(self) -> list[Answer]:
        reading = [self._prefilling[0]] if self._prefilling else []
        with self._changed:  # other threads append to _waiting
            return [*self._waiting, *reading, *self._rows]

    def _drop_cancelled(self):
        for answer in self._all():
            if answer.cancelled:
                self._end(answer, Delta(finish_reason="cancelled"))
        self._remove_ended()

    def _remove_ended(self):
        with self._changed:
            self._waiting = deque(answer for answer in self._waiting if not answer.finish_reason)
        if self._prefilling and self._prefilling[0].finish_reason:
            self._prefilling = None
        going = [index for index, answer in enumerate(self._rows) if not answer.finish_reason]
        self._batch.keep(going)
        self._rows = [self._rows[index] for index in going]

    def _prefill(self):
        """Prefill up to ``prefill_chunk`` prompt tokens; a completed prompt joins the batch."""
        left = self.config.prefill_chunk
        while left > 0 and (answer := self._next_prompt()):
            try:
                if self._prefilling is None:
                    self._prefilling = answer, self._batch.prompt(answer.inputs, answer.decoding)
                prompt = self._prefilling[1]
                read, logits_V = prompt.advance(left)
                left -= read
                if logits_V is None:
                    return
                answer.take(logits_V)
                if answer.finish_reason:
                    self._end(answer)
                else:
                    self._batch.join(prompt)
                    self._rows.append(answer)
            except Exception as error:
                logger.exception("a prompt failed")
                self._end(answer, Delta(error=error))
            self._prefilling = None

    def _next_prompt(self) -> Answer | None:
        """The answer whose prompt is being prefilled, or the first waiting one if the batch has room."""
        if self._prefilling:
            return self._prefilling[0]
        with self._changed:
            if not self._waiting or len(self._rows) >= self.max_batch:
                return None
            together = [*self._rows, self._waiting[0]]
            if self._rows and any(answer.decoding.rewire for answer in together):
                return None  # it trains while the others would wait
            longest = max(answer.prompt_tokens + answer.longest for answer in together)
            caches = sum(2 if answer.decoding.contrast else 1 for answer in together)
            if self._rows and longest * caches > self.config.max_cached_tokens:
                return None
            return self._waiting.popleft()

    def _step(self):
        """Decode one token of every row."""
        if not self._rows:
            return
        try:
            logits_BV = self._batch.step([answer.tokens[-1] for answer in self._rows])
        except Exception as error:
            logger.exception("a step failed")
            for answer in self._rows:
                self._end(answer, Delta(error=error))
            self._rows = []
            self._batch.keep([])
            return
        for answer, logits_V in zip(self._rows, logits_BV, strict=True):
            try:
                answer.take(logits_V)
                if answer.finish_reason:
                    self._end(answer)
            except Exception as error:
                logger.exception("an answer failed")
                self._end(answer, Delta(error=error))
        self._remove_ended()

    def _end(self, answer: Answer, delta: Delta | None = None) -> None:
        """Count the answer as ended, with a last delta unless it sent its own."""
        if delta is not None:
            answer.end(delta)
        with self._changed:
            self._taken -= 1
