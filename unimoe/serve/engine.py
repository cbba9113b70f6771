"""One thread that runs the model for all answers: continuous batching.

    submit -> waiting -> prompt, read in pieces -> a row of the running batch -> pieces, told to the client

Between two steps rows join and leave. Prompts are read some tokens at a time, so that a long one neither
stops the answers beside it nor keeps one from being cancelled.
"""

import logging
import threading
from collections import deque
from dataclasses import dataclass

import torch

from unimoe.errors import UserError
from unimoe.model.modeling import UniMoeForConditionalGeneration

from .answer import Answer, Piece
from .batch import Prompt, RunningBatch, can_batch

logger = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full."""


@dataclass(frozen=True)
class EngineConfig:
    """How much an engine does at once."""

    max_batch: int = 8
    """Answers made together."""
    max_queue: int = 32
    """Answers that wait for a place among them."""
    max_cached_tokens: int = 32768
    """Positions in the KV cache, padding counted; an answer that would need more waits, except alone."""
    prompt_piece: int = 256
    """Tokens of prompts that are read between two steps."""

    def __post_init__(self):
        for name in vars(self):
            least = 0 if name == "max_queue" else 1
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, found {getattr(self, name)}")


class Engine:
    """Runs answers until :meth:`close`. All public methods may be called from any thread."""

    def __init__(self, model: UniMoeForConditionalGeneration, config: EngineConfig | None = None):
        self.model = model
        self.config = config or EngineConfig()
        self.max_batch = self.config.max_batch
        if self.max_batch > 1 and not can_batch(model):
            logger.warning("this LLM's cache has layers that rows cannot share; answers are made one by one")
            self.max_batch = 1
        self._places = self.max_batch + self.config.max_queue
        self._taken = 0
        self._waiting: deque[Answer] = deque()
        self._reading: tuple[Answer, Prompt] | None = None
        self._rows: list[Answer] = []
        self._batch = RunningBatch(model)
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="unimoe-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that have a token."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Answers that have none yet."""
        return len(self._waiting) + (self._reading is not None)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def reserve(self):
        """Take a place for an answer. Raises Busy when there is none."""
        with self._changed:
            if self._closed or self._taken >= self._places:
                raise Busy
            self._taken += 1

    def release(self):
        """Give back a place for which no answer was submitted; one that was gives it back at its end."""
        with self._changed:
            self._taken -= 1

    def submit(self, answer: Answer):
        """Run ``answer`` in a reserved place."""
        with self._changed:
            if self._closed:
                self._taken -= 1
                raise Busy
            self._waiting.append(answer)
            self._changed.notify()

    def close(self):
        """Cancel what runs and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self):
        with torch.inference_mode():
            while self._wait_for_work():
                self._drop_cancelled()
                self._read_prompts()
                self._step()
        for answer in self._all():
            self._end(answer, Piece(finish_reason="cancelled"))

    def _wait_for_work(self) -> bool:
        """Sleeps while there is nothing to do. False when the engine was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._all())
            return not self._closed

    def _all(self) -> list[Answer]:
        reading = [self._reading[0]] if self._reading else []
        with self._changed:  # others append to what waits
            return [*self._waiting, *reading, *self._rows]

    def _drop_cancelled(self):
        for answer in self._all():
            if answer.cancelled:
                self._end(answer, Piece(finish_reason="cancelled"))
        self._forget_ended()

    def _forget_ended(self):
        with self._changed:
            self._waiting = deque(answer for answer in self._waiting if not answer.finish_reason)
        if self._reading and self._reading[0].finish_reason:
            self._reading = None
        going = [index for index, answer in enumerate(self._rows) if not answer.finish_reason]
        self._batch.keep(going)
        self._rows = [self._rows[index] for index in going]

    def _read_prompts(self):
        """Up to ``prompt_piece`` tokens of prompts; whoever comes to the end of it joins the batch."""
        left = self.config.prompt_piece
        while left > 0 and (answer := self._next_reader()):
            try:
                if self._reading is None:
                    self._reading = answer, Prompt(self.model, answer.inputs)
                prompt = self._reading[1]
                read, logits_V = prompt.advance(left)
                left -= read
                if logits_V is None:
                    return
                answer.take(logits_V)
                if answer.finish_reason:
                    self._end(answer)
                else:
                    self._batch.join(prompt.cache, prompt.ahead)
                    self._rows.append(answer)
            except Exception as error:
                logger.exception("a prompt failed")
                self._end(answer, Piece(error=error))
            self._reading = None

    def _next_reader(self) -> Answer | None:
        """The answer whose prompt is being read, or the first that waits, if the batch has room for it."""
        if self._reading:
            return self._reading[0]
        with self._changed:
            if not self._waiting or len(self._rows) >= self.max_batch:
                return None
            longest = max(answer.prompt_tokens + answer.longest for answer in [*self._rows, self._waiting[0]])
            if self._rows and longest * (len(self._rows) + 1) > self.config.max_cached_tokens:
                return None
            return self._waiting.popleft()

    def _step(self):
        """One more token for every row."""
        if not self._rows:
            return
        try:
            logits_BV = self._batch.step([answer.tokens[-1] for answer in self._rows])
        except Exception as error:
            logger.exception("a step failed")
            for answer in self._rows:
                self._end(answer, Piece(error=error))
            self._rows, self._batch = [], RunningBatch(self.model)
            return
        for answer, logits_V in zip(self._rows, logits_BV, strict=True):
            try:
                answer.take(logits_V)
                if answer.finish_reason:
                    self._end(answer)
            except Exception as error:
                logger.exception("an answer failed")
                self._end(answer, Piece(error=error))
        self._forget_ended()

    def _end(self, answer: Answer, piece: Piece | None = None):
        """Count the answer as ended, with a last piece unless it told its own."""
        if piece is not None:
            answer.end(piece)
        with self._changed:
            self._taken -= 1
