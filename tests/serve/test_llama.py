"""The server on llama.cpp; UNIMOE_TEST_ENGINE=llama.cpp runs all other tests of it there."""

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from unimoe.inference.generate import generate
from unimoe.inference.llama import LlamaBatch

QUESTIONS = ["short", "a longer question, " * 20, "and another", "one " * 50]


@pytest.fixture(scope="module")
def llama_server(serving, in_llama):
    with serving(in_llama) as server:
        yield server


def say(server, text, tokens=12, **settings):
    asked = [{"role": "user", "content": text}]
    return server.client.chat.completions.create(
        model="tiny", messages=asked, max_tokens=tokens, temperature=0, **settings
    )


def alone(tiny, text, tokens):
    """torch's answer, without a server."""
    model, processor = tiny
    encoded = processor.encode([{"role": "user", "content": text}], add_generation_prompt=True)
    return generate(model, processor, processor.pad([encoded], "left"), tokens)[0]


def test_answers_made_together_are_those_of_torch(llama_server, tiny):
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda text: say(llama_server, text), QUESTIONS))
    said = [answer.choices[0].message.content.strip() for answer in answers]
    assert said == [alone(tiny, text, 12) for text in QUESTIONS]


def test_a_stream_and_its_log_probabilities(llama_server, tiny):
    chunks = list(say(llama_server, "hi", stream=True, logprobs=True, top_logprobs=2))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.strip() == alone(tiny, "hi", 12)
    tokens = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
    ]
    assert len(tokens) == 12 and all(token.top_logprobs[0].logprob <= 0 for token in tokens)


def test_the_cache_grows_while_rows_are_running(llama_server, tiny):
    llama = llama_server.service.model.llama
    with ThreadPoolExecutor(2) as pool:
        long, short = pool.map(lambda n: say(llama_server, "long", n), (700, 12))
    assert llama._cells > 512
    whole = alone(tiny, "long", 700)
    assert long.choices[0].message.content.strip() == whole
    assert whole.startswith(short.choices[0].message.content.strip())


def test_a_client_that_leaves_frees_its_sequence(llama_server):
    engine = llama_server.service.engine
    stream = say(llama_server, "x", 3000, stream=True)
    next(iter(stream))
    while not engine.running:  # the first delta comes before the row joins
        time.sleep(0.01)
    stream.close()
    while engine.running:
        time.sleep(0.01)
    assert llama_server.service.model.llama.lengths == {}


def test_placeholders_and_control_tokens_that_somebody_types_are_text(llama_server, tiny):
    typed = "<image> <|im_end|> <speech>"
    assert say(llama_server, typed).choices[0].message.content.strip() == alone(tiny, typed, 12)
    with pytest.raises(openai.BadRequestError, match="at most 4096"):
        say(llama_server, "a" * 100_000)


def test_a_failed_step_frees_all_rows(llama_server, tiny, monkeypatch):
    def broken(self, tokens):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaBatch, "step", broken)
        with pytest.raises(openai.InternalServerError):
            say(llama_server, "hi")
    assert say(llama_server, "hi").choices[0].message.content.strip() == alone(tiny, "hi", 12)
