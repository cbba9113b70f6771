"""What a request may ask for, and how its generation is set; no model is needed."""

import json

import pytest
from pydantic import ValidationError
from transformers import GenerationConfig

from unimoe.compress.decoding import Decoding
from unimoe.serve.protocol import BadRequest, ChatRequest
from unimoe.testing import tiny_mixtral

ASK = [{"role": "user", "content": "hi"}]


def sampling(defaults=None, **fields):
    return ChatRequest(messages=ASK, **fields).sampling(defaults or GenerationConfig(), 100, 50).generation


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-38, 1e-30, 1e-9])
def test_a_temperature_that_is_next_to_nothing_is_greedy(temperature):
    config = sampling(GenerationConfig(do_sample=True, temperature=0.7), temperature=temperature)
    assert config.do_sample is False and config.temperature is None


def test_greedy_drops_the_penalties_of_the_folder_but_not_those_of_the_request():
    folder = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_length": 5, "num_beams": 4}
    greedy, beams = GenerationConfig(**folder), GenerationConfig(do_sample=True, temperature=0.7, **folder)
    for found in (
        sampling(greedy),
        sampling(greedy, temperature=0),
        sampling(beams, temperature=0),
        sampling(beams, generation_config='{"do_sample": false}'),
        sampling(beams, generation_config='{"temperature": 0.0}'),
    ):
        assert not found.do_sample and found.temperature is None and found.repetition_penalty == 1.0
        assert (found.no_repeat_ngram_size, found.min_length, found.num_beams) == (0, 0, 1)
    asked = sampling(beams, generation_config='{"repetition_penalty": 1.1}', temperature=0)
    assert not asked.do_sample and asked.repetition_penalty == 1.1
    sampled = sampling(beams)
    assert sampled.do_sample and sampled.temperature == 0.7
    assert sampled.repetition_penalty == 1.3 and sampled.num_beams == 1


def test_fields_take_precedence_over_what_is_sent_and_that_over_the_model():
    sent = json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": 3})
    config = sampling(GenerationConfig(top_p=0.3, top_k=1), generation_config=sent, temperature=1.5)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 1.5, 7, 0.3)
    assert config.eos_token_id is None and config.max_new_tokens == 50


@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"do_sample": True, "temperature": 0.0}, "generation_config.temperature"),
        ({"temperature": -1}, "generation_config.temperature"),
        ({"do_sample": True, "top_k": -5}, "generation_config.top_k"),
        ({"repetition_penalty": 0}, "generation_config.repetition_penalty"),
        ({"do_sample": True, "min_p": 5}, "generation_config.min_p"),
        ({"do_sample": True, "top_p": "x"}, "generation_config.top_p"),
        ({"max_new_tokens": 0}, "generation_config.max_new_tokens"),
        ([], "generation_config"),
        (None, "generation_config"),
    ],
)
def test_sent_settings_out_of_range_are_named(sent, param):
    with pytest.raises(BadRequest) as caught:
        sampling(generation_config=json.dumps(sent))
    assert caught.value.param == param and str(caught.value).startswith(f"{param}: ")
    with pytest.raises(BadRequest, match="generation_config: not JSON"):
        sampling(generation_config="[" * 5000)


def test_more_tokens_than_there_is_room_for():
    with pytest.raises(BadRequest, match="max_tokens: found 60, the prompt leaves room for 50") as caught:
        sampling(max_tokens=60)
    assert caught.value.param == "max_tokens"


def test_what_a_request_says_of_experts_precedes_the_servers_settings():
    model, default = tiny_mixtral(), Decoding(contrast=0.5, experts=1)

    def decoding(**fields):
        return ChatRequest(messages=ASK, **fields).decoding(default, model)

    assert decoding() == default
    assert decoding(contrast=0, rewire=3) == Decoding(experts=1, rewire=3)
    assert decoding(skip={"text": 0.2}, experts=0) == Decoding({"text": 0.2}, contrast=0.5)
    for fields, param in (({"experts": 3}, "experts"), ({"skip": {"vidoe": 0.1}}, "skip")):
        with pytest.raises(BadRequest) as caught:
            decoding(**fields)
        assert caught.value.param == param
    for fields in ({"contrast": -1}, {"rewire": 1000}, {"skip": {"text": -1}}, {"skip": 0.1}):
        with pytest.raises(ValidationError):
            decoding(**fields)


def test_fields_that_are_not_supported_are_named():
    for name, value in (("tools", [{}]), ("frequency_penalty", 1), ("nonsense", 1)):
        with pytest.raises(BadRequest, match="does not support it") as caught:
            ChatRequest.model_validate({"messages": ASK, name: value}).check()
        assert caught.value.param == name
    ChatRequest.model_validate({"messages": ASK, "user": "x", "frequency_penalty": 0}).check()
