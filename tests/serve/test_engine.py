"""Answers made together by the engine, without a network."""

import threading

import pytest
import torch
from transformers import GenerationConfig

from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.errors import UserError
from unimoe.inference.generate import generate
from unimoe.model.loading import load_model
from unimoe.moe.view import view
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


def test_bits_by_token_are_served_and_chatted_as_the_model_reads_them(tiny, tmp_path):
    for part in tiny:  # another test's server may run this one with other classes
        part.save_pretrained(tmp_path / "whole")
    model, processor = load_model(tmp_path / "whole", device="cpu")
    compress(model, Plan(bits=4, group=8))
    compress(model, Plan(nested=[2, 3, 4]))
    for layer in view(model):
        torch.nn.init.normal_(layer.block.bit_router.weight)
        layer.block.bit_router.bias.data.zero_()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "by_token")
    loaded = load_model(tmp_path / "by_token", device="cpu")
    texts = ["short", "a longer question", "x"]
    for text, tokens in zip(texts, run(loaded, texts, None), strict=True):
        asked = processor.encode([{"role": "user", "content": text}], add_generation_prompt=True)
        prompt = processor.pad([asked], "left")
        said = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert generate(*loaded, prompt, 12) == [said]
        ids = torch.cat([prompt["input_ids"], torch.tensor([tokens])], 1)
        with torch.no_grad():
            logits_TV = model(input_ids=ids).logits[0, -len(tokens) - 1 : -1]  # neither cache nor few rows
        best_T, found_T = logits_TV.amax(1), logits_TV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (best_T - found_T).max() < 0.02 * logits_TV.abs().max()  # rounded activations of a tie


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
