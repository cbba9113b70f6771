"""Answers made together by the engine, without a network."""

import threading

import pytest
from transformers import GenerationConfig

from unimoe.errors import UserError
from unimoe.serve.answer import Answer, SamplingParams
from unimoe.serve.engine import Engine, EngineConfig, QueueFull

LONG = 4000
"""Tokens: seconds of work for the tiny model."""


class Asked(Answer):
    """An answer that waits for its own end."""

    def __init__(self, tiny, text, tokens):
        model, processor = tiny
        encoded = processor.encode([{"role": "user", "content": text}], add_generation_prompt=True)
        sampling = SamplingParams(GenerationConfig(max_new_tokens=tokens))
        self.ended = threading.Event()
        super().__init__(model, processor.tokenizer, processor.pad([encoded], "left"), sampling, self.told)

    def told(self, delta):
        if delta.finish_reason or delta.error:
            self.ended.set()


def submit(engine, *answers):
    for answer in answers:
        engine.reserve()
        engine.submit(answer)


def run(tiny, texts, config):
    """The tokens of all answers, asked at once."""
    engine = Engine(tiny[0], config)
    answers = [Asked(tiny, text, 12) for text in texts]
    submit(engine, *answers)
    for answer in answers:
        answer.ended.wait()
    engine.close()
    assert not engine.alive
    return [answer.tokens for answer in answers]


def test_neither_prefill_chunks_nor_room_in_the_cache_change_an_answer(tiny):
    texts = ["short", "a longer question, " * 20, "and another", "one " * 50]
    expected = [run(tiny, [text], EngineConfig(max_batch=1))[0] for text in texts]
    assert run(tiny, texts, EngineConfig(max_batch=4, prefill_chunk=7)) == expected
    assert run(tiny, texts, EngineConfig(max_batch=4, max_cached_tokens=300)) == expected


def test_who_waits_can_leave_and_gives_back_the_place(tiny):
    engine = Engine(tiny[0], EngineConfig(max_batch=1, max_queue=1))
    first, second = Asked(tiny, "first", LONG), Asked(tiny, "second", LONG)
    submit(engine, first, second)
    with pytest.raises(QueueFull):
        engine.reserve()
    second.cancel()
    second.ended.wait()
    assert (second.finish_reason, second.tokens) == ("cancelled", [])
    engine.reserve()
    engine.release()
    engine.close()
    assert first.finish_reason == "cancelled"
    assert len(first.tokens) < LONG


def test_a_closed_engine_takes_nothing(tiny):
    engine = Engine(tiny[0])
    engine.reserve()
    engine.close()
    with pytest.raises(QueueFull):
        engine.submit(Asked(tiny, "late", 2))
    with pytest.raises(QueueFull):
        engine.reserve()


def test_settings_that_make_no_sense():
    with pytest.raises(UserError, match="max_batch must be at least 1, found 0"):
        EngineConfig(max_batch=0)
