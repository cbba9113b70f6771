"""Answers of one batch whose rows skip, contrast and rewire, against each question alone and offline."""

import threading
import weakref

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from unimoe.compress import rewire
from unimoe.compress.decoding import Decoding, generate_ids
from unimoe.inference.generate import generate
from unimoe.model.host import follow_tokens
from unimoe.model.host_processor import HostProcessor
from unimoe.moe.view import view
from unimoe.serve.answer import Answer, SamplingParams
from unimoe.serve.engine import Engine, EngineConfig
from unimoe.serve.routed_batch import RoutedBatch
from unimoe.testing import IMAGE, tiny_model
from unimoe.testing_hosts import MIXTURES

SETTINGS = [
    Decoding(),
    Decoding(contrast=2.0),
    Decoding(skip={"text": 0.49, "image": 0.2}),
    Decoding(experts=1, contrast=0.5),
    Decoding(rewire=3),
    Decoding(skip={"image": 0.6}),
]
TOKENS = 10


@pytest.fixture(scope="module", params=["unimoe", "qwen3_vl_moe"])
def mixture(request, tmp_path_factory):
    """A random model with images whose experts differ, ours or of transformers; it never ends an answer."""
    if request.param == "unimoe":
        parts = tiny_model(tmp_path_factory.mktemp("mixture"), {"num_experts": 4, "top_k": 2}, image=IMAGE)
    else:
        model, processor = MIXTURES[request.param]()
        parts = model, HostProcessor(processor)
        follow_tokens(model)
    with torch.no_grad():
        for layer in view(parts[0]):
            layer.stacks()["down_proj"].normal_(std=0.3)
    parts[0].generation_config.eos_token_id = None
    return parts[0].eval(), parts[1]


def inputs(mixture, text):
    content = [{"type": "image", "image": Image.new("RGB", (28, 56), "red")}, {"type": "text", "text": text}]
    encoded = mixture[1].encode([{"role": "user", "content": content}], add_generation_prompt=True)
    return mixture[1].pad([encoded], "left")


class Asked(Answer):
    def __init__(self, mixture, text, decoding):
        self.ended, self.error = threading.Event(), None
        sampling = SamplingParams(GenerationConfig(max_new_tokens=TOKENS))
        super().__init__(
            mixture[0], mixture[1].tokenizer, inputs(mixture, text), sampling, self.told, decoding
        )

    def told(self, delta):
        self.error = delta.error
        if delta.finish_reason or delta.error:
            self.ended.set()


def serve(mixture, asked, config=None):
    """The tokens of all answers, asked at once."""
    engine = Engine(mixture[0], config)
    answers = [Asked(mixture, text, decoding) for text, decoding in asked]
    for answer in answers:
        engine.reserve()
        engine.submit(answer)
    for answer in answers:
        answer.ended.wait()
    engine.close()
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [answer.tokens for answer in answers]


def alone(mixture, text, decoding):
    """The tokens that the command line's way of decoding gives."""
    one = inputs(mixture, text)
    with torch.inference_mode():
        ids = generate_ids(mixture[0], one, decoding, {"max_new_tokens": TOKENS, "do_sample": False})
    return ids[0, one["input_ids"].shape[1] :].tolist()


def test_rows_of_one_batch_answer_as_offline(mixture, monkeypatch):
    monkeypatch.setattr(rewire, "BLOCK", 4)  # trained twice again within ten tokens
    asked = [(f"question {index}", decoding) for index, decoding in enumerate(SETTINGS)]
    expected = [alone(mixture, *one) for one in asked]
    assert serve(mixture, asked, EngineConfig(max_batch=6, prefill_chunk=9)) == expected
    plain = [alone(mixture, text, Decoding(skip={})) for text, _ in asked]
    different = [found != same for found, same in zip(expected, plain, strict=True)]
    assert different[0] is False and different[1] and any(different[2:])


@torch.inference_mode()
def test_rows_keep_nothing_that_the_batch_has(mixture):
    batch, caches = RoutedBatch(mixture[0]), []
    for text in ("one", "another"):
        prompt = batch.prompt(inputs(mixture, text), Decoding(contrast=0.5))
        while prompt.advance(64)[1] is None:
            pass
        caches += [weakref.ref(prompt.strong.cache), weakref.ref(prompt.weak.cache)]
        batch.join(prompt)
        del prompt
    assert [cache() for cache in caches] == [None, None, batch.strong.cache, batch.weak.cache]
    assert batch.step([5, 6]).shape[0] == 2


def test_the_command_lines_answer_is_the_servers(mixture):
    text = generate(*mixture, inputs(mixture, "hello"), TOKENS, decoding=Decoding(contrast=2.0))[0]
    served = serve(mixture, [("hello", Decoding(contrast=2.0))])[0]
    assert mixture[1].tokenizer.decode(served, skip_special_tokens=True).strip() == text


def test_a_second_cache_counts_and_rewired_answers_are_alone(mixture):
    engine = Engine(mixture[0], EngineConfig(max_batch=4, max_cached_tokens=150))
    engine.close()
    first, second, third = (Asked(mixture, "hi", SETTINGS[index]) for index in (0, 1, 4))
    room = (first.prompt_tokens + TOKENS) * 3
    for most, joins in ((room, True), (room - 1, False)):
        engine.config = EngineConfig(max_batch=4, max_cached_tokens=most)
        engine._rows, engine._waiting = [first], type(engine._waiting)([second])
        assert (engine._next_prompt() is second) is joins
    for rows, waiting in (([first], third), ([third], first)):
        engine.config = EngineConfig(max_batch=4)
        engine._rows, engine._waiting = rows, type(engine._waiting)([waiting])
        assert engine._next_prompt() is None
    engine._rows = []
    assert engine._next_prompt() is first
