"""The server as the official client sees it, over a real socket."""

import base64
import io
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import soundfile
from huggingface_hub import InferenceClient
from PIL import Image

from unimoe.compress.decoding import Decoding
from unimoe.inference.generate import generate
from unimoe.media.audio import load_audio
from unimoe.media.image import load_image
from unimoe.media.video import write_video
from unimoe.model.host_processor import HostProcessor
from unimoe.serve.answer import Answer
from unimoe.serve.app import POLL_SECONDS
from unimoe.serve.engine import EngineConfig
from unimoe.testing_hosts import MIXTURES

ASK = [{"role": "user", "content": "What is this?"}]
LONG = 3000
"""Tokens: seconds of work for the tiny model."""


def alone(tiny, messages, tokens):
    """What the model says when it is asked by itself."""
    model, processor = tiny
    return generate(model, processor, processor.pad([processor.encode(messages, True)], "left"), tokens)[0]


def say(client, messages=ASK, **settings):
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 12, **settings})


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(color) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (50, 40), color).save(file, "PNG")
    return file.getvalue()


def sound(seconds) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(0).normal(0, 0.1, int(seconds * 16000)).astype(np.float32)
    soundfile.write(file, samples, 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def until(condition):
    """Waits for what another thread is about to do; the test's own time limit ends it."""
    while not condition():
        time.sleep(0.01)


def test_text(client, tiny):
    answer = say(client)
    assert answer.choices[0].message.content.strip() == alone(tiny, ASK, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(tiny[1].encode(ASK, True)["input_ids"])
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


@pytest.mark.skipif(os.environ.get("UNIMOE_TEST_ENGINE") == "llama.cpp", reason="it routes by itself")
def test_a_request_says_how_experts_take_part(client, tiny):
    settings = {"skip": {"text": 0.4}, "contrast": 0.5, "rewire": 1}
    model, processor = tiny
    batch = processor.pad([processor.encode(ASK, True)], "left")
    wanted = generate(model, processor, batch, 12, decoding=Decoding(**settings))[0]
    assert say(client, extra_body=settings).choices[0].message.content.strip() == wanted


def test_streaming_gives_the_same_text(client):
    chunks = list(say(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == say(client, max_tokens=40).choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:-1]] == ["length"]
    assert chunks[-1].usage.completion_tokens == 40
    assert len(chunks) > 6


def test_end_of_turn_is_a_reason_to_stop(served, serving):
    model, processor = served
    ids = model.generate(**processor.apply_chat_template(ASK, tokenize=True, add_generation_prompt=True),
                         max_new_tokens=12, do_sample=False)[0, -12:].tolist()  # fmt: skip
    model.generation_config.eos_token_id = ids[4]
    try:
        with serving() as server:
            answer = say(server.client)
    finally:
        model.generation_config.eos_token_id = None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == ids.index(ids[4]) + 1
    assert answer.choices[0].message.content == processor.tokenizer.decode(ids[: ids.index(ids[4])])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_are_no_part_of_it(client, stream):
    whole = say(client, max_tokens=40).choices[0].message.content
    stop = whole[10:13]
    answer = say(client, max_tokens=40, stop=["never said", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_a_seed_makes_sampling_repeatable(client):
    def sampled(seed):
        return say(client, temperature=1.0, top_p=0.9, seed=seed, max_tokens=30).choices[0].message.content

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) > 1


def test_logprobs(client):
    answer = say(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    for token in content:
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.logprob == token.top_logprobs[0].logprob > token.top_logprobs[1].logprob
    chunks = [chunk.choices[0] for chunk in say(client, logprobs=True, stream=True) if chunk.choices]
    streamed = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_picture_and_sound(client, tiny):
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(picture("red"), "image/png")}},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound(0.5)).decode()}},
        {"type": "audio_url", "audio_url": {"url": data_url(sound(0.3), "audio/wav")}},
        {"type": "text", "text": "What is this?"},
    ]  # fmt: skip
    decoded = [
        {"type": "image", "image": load_image({"type": "image", "bytes": picture("red")}, "")},
        {"type": "speech", "speech": load_audio({"type": "speech", "bytes": sound(0.5)}, "")},
        {"type": "speech", "speech": load_audio({"type": "speech", "bytes": sound(0.3)}, "")},
        {"type": "text", "text": "What is this?"},
    ]
    answer = say(client, [{"role": "user", "content": parts}])
    asked = [{"role": "user", "content": decoded}]
    assert answer.choices[0].message.content.strip() == alone(tiny, asked, 12)
    assert answer.usage.prompt_tokens == len(tiny[1].encode(asked, True)["input_ids"])


def test_video(client, tiny, tmp_path):
    frames = [Image.new("RGB", (48, 32), (40 * index, 0, 0)) for index in range(6)]
    write_video(tmp_path / "a.mp4", frames, 2)
    part = {
        "type": "video_url",
        "video_url": {"url": data_url((tmp_path / "a.mp4").read_bytes(), "video/mp4")},
    }
    asked = [{"role": "user", "content": [{"type": "video", "path": str(tmp_path / "a.mp4")}]}]
    answer = say(client, [{"role": "user", "content": [part]}])
    assert answer.choices[0].message.content.strip() == alone(tiny, asked, 12)


def test_twenty_at_once_are_answered_as_one_by_one(serving):
    """Lengths, media and times of arrival differ; rows join and leave."""
    asked = []
    for index in range(20):
        content = [{"type": "text", "text": "and so on, " * (index * 3 % 17) + f"number {index}?"}]
        if index % 3 == 0:
            url = data_url(picture((12 * index, 0, 0)), "image/png")
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        asked.append([{"role": "user", "content": content}])
    lengths = [5 + 7 * index % 40 for index in range(20)]
    with serving(engine=EngineConfig(max_batch=6, prefill_chunk=64)) as server:

        def answer(index):
            said = say(server.client, asked[index], max_tokens=lengths[index])
            return said.choices[0].message.content

        one_by_one = [answer(index) for index in range(20)]
        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(answer, range(20))) == one_by_one
        assert server.service.engine.running == server.service.engine.waiting == 0


def test_a_full_queue_is_429_and_a_client_that_leaves_makes_room(serving):
    with serving(max_new_tokens=LONG, engine=EngineConfig(max_batch=1, max_queue=0)) as server:
        stream = say(server.client, stream=True, max_tokens=LONG)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="queue is full") as busy:
            say(server.client)
        assert busy.value.code == "server_busy"
        stream.close()
        until(lambda: not server.service.engine.running)
        assert say(server.client, max_tokens=3).usage.completion_tokens == 3
        count = server.service.metrics.registry.get_sample_value
        assert count("unimoe_answers_total", {"how": "cancelled"}) == 1
        assert count("unimoe_answer_tokens_total") < LONG


def test_a_client_that_leaves_before_its_answer(serving):
    with serving(max_new_tokens=LONG) as server:
        with pytest.raises(openai.APITimeoutError):
            say(server.client.with_options(timeout=1), max_tokens=LONG)
        until(lambda: not server.service.engine.running)
        count = server.service.metrics.registry.get_sample_value
        until(lambda: count("unimoe_answers_total", {"how": "cancelled"}))
        assert count("unimoe_answer_tokens_total") < LONG


@pytest.mark.parametrize("engine", ["tiny", "in_llama"])
def test_a_client_that_leaves_costs_one_step_at_most(engine, request, serving, monkeypatch):
    """The server looks after its clients several times a second, also while the engine makes no progress;
    a row is freed before the next step."""
    parts, count = request.getfixturevalue(engine), 20
    permits, steps = threading.Semaphore(count), []
    with serving(parts, max_new_tokens=LONG) as server:
        running = server.service.engine
        step = running._batch.step

        def gated(tokens):
            permits.acquire()
            steps.append(len(tokens))
            return step(tokens)

        monkeypatch.setattr(running._batch, "step", gated)
        try:
            stream = say(server.client, stream=True, max_tokens=LONG)
            until(lambda: len(steps) == count)  # the next one waits
            stream.close()
            until(lambda: all(answer.cancelled for answer in running._rows))
        finally:
            permits.release(LONG)
        until(lambda: not running.running)
        assert len(steps) <= count + 1
        if engine == "in_llama":
            assert parts[0].llama.lengths == {}
    assert POLL_SECONDS <= 0.5


def test_an_exception_fails_its_request_alone(client, tiny, monkeypatch):
    take = Answer.take

    def broken(self, logits_V):
        if self._sampling.seed == 13 and len(self.tokens) == 2:
            raise RuntimeError("unlucky")
        take(self, logits_V)

    monkeypatch.setattr(Answer, "take", broken)
    with ThreadPoolExecutor() as pool:
        beside = pool.submit(say, client, max_tokens=200)
        with pytest.raises(openai.InternalServerError, match="failed on this request"):
            say(client, seed=13)
        with pytest.raises(openai.APIError, match="failed on this request"):
            list(say(client, seed=13, stream=True))
        assert beside.result().choices[0].message.content.strip() == alone(tiny, ASK, 200)


def test_a_failed_step_does_not_end_the_server(server, client, monkeypatch):
    def broken(self, tokens):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(type(server.service.engine._batch), "step", broken)
        with pytest.raises(openai.InternalServerError):
            say(client)
    assert say(client).usage.completion_tokens == 12


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"extra_body": {"experts": 3}}, "experts"),
        ({"extra_body": {"skip": {"text": "much"}}}, "skip.text"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0]"),
    ],
)
def test_what_cannot_be_is_said_in_openais_shape(client, settings, param):
    with pytest.raises(openai.BadRequestError, match=re.escape(param)) as error:
        say(client, **settings)
    assert error.value.type == "invalid_request_error" and error.value.param == param


def test_what_asks_for_nothing_is_taken(client):
    nothing = {"n": 1, "frequency_penalty": 0, "user": "me", "response_format": {"type": "text"}}
    assert say(client, **nothing).usage.completion_tokens == 12


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here") as error:
        client.chat.completions.create(model="gpt", messages=ASK)
    assert error.value.code == "model_not_found"


def test_health_and_metrics(server, client):
    say(client)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": "tiny"}
    page = httpx.get(f"{server.url}/metrics").text
    assert "unimoe_answers_running 0.0" in page
    assert 'unimoe_answers_total{how="length"}' in page


def test_transformers_chat_can_talk_to_it(server, client):
    """What its client does: asks for the model to be loaded, and sends a generation_config along."""
    loading = httpx.post(f"{server.url}/load_model", json={"model": "tiny"}).text
    assert loading.startswith('data: {"status": "ready"')
    sent = {"generation_config": '{"do_sample": true, "max_new_tokens": 5, "top_k": 1}', "model": "tiny"}
    hub = InferenceClient(base_url=f"{server.url}/v1")
    stream = hub.chat_completion(ASK, model="tiny", stream=True, extra_body=sent)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == say(client, max_tokens=5).choices[0].message.content


def test_a_mixture_of_experts_of_transformers(serving):
    model, processor = MIXTURES["qwen3_vl_moe"]()
    model.generation_config.eos_token_id = None
    parts = model, HostProcessor(processor)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 56, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    url = {"url": data_url(buffer.getvalue(), "image/png")}
    words = {"type": "text", "text": "What is this?"}
    expected = alone(parts, [{"role": "user", "content": [{"type": "image", "image": noise}, words]}], 6)
    with serving(parts) as server:
        asked = [{"role": "user", "content": [{"type": "image_url", "image_url": url}, words]}]
        said = say(server.client, asked, max_tokens=6).choices[0].message.content
    assert said.strip() == expected
