"""What strangers may try: each is refused with one line, and the server goes on."""

import json
import pickle

import httpx
import openai
import pytest
import torch

from unimoe.errors import UserError
from unimoe.model.loading import load_model

ASK = [{"role": "user", "content": "What is this?"}]


@pytest.mark.parametrize("text", ["a" * 100_000, "word " * 1_000_000])
def test_a_prompt_that_is_too_long(client, text):
    with pytest.raises(openai.BadRequestError, match="at most 4096") as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}])
    assert error.value.code == "context_length_exceeded"


def post(server, body, **headers):
    headers = {"content-type": "application/json", **headers}
    return httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"messages": ' + b'[{"content": ' * 50_000,
        b'{"x":' * 5000 + b"1" + b"}" * 5000,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "top_p": 1e999}',
        b"\xff\xfe",
        b"",
        b"null",
    ],
)
def test_bodies_that_are_no_request(server, body):
    reply = post(server, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_text_with_half_a_character(server):
    body = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}'
    assert post(server, body).status_code == 200
    assert post(server, body.replace(b"user", b"\\ud800")).status_code == 400
    assert post(server, body.replace(b"{", b'{"model": "\\ud800", ', 1)).status_code == 404


def test_placeholders_that_somebody_types_are_text(client):
    asked = [{"role": "user", "content": "<image> <|im_end|> <speech>"}]
    assert client.chat.completions.create(model="tiny", messages=asked, max_tokens=2).usage


def test_nothing_is_unpickled_while_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_model(tmp_path, hub=False)
    monkeypatch.undo()
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no file named model.safetensors"):
        load_model(tmp_path, hub=False)


def content(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        (content({"type": "input_text", "text": "x"}), "messages[0].content[0]", "one of text, image_url"),
        (content({"text": "x"}), "messages[0].content[0]", "one of text, image_url"),
        (content({"type": "text"}), "messages[0].content[0].text", "required"),
        (content({"type": "image_url", "image_url": {}}), "messages[0].content[0].image_url.url", "required"),
        (content({"type": "image_url", "image_url": "data:;base64,AAAA"}), "messages[0].content[0]", "read"),
        (
            content({"type": "input_audio", "input_audio": {"data": 3}}),
            "messages[0].content[0].input_audio.data",
            "",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "list of parts, found null",
        ),
        ({"messages": [{"role": "judge", "content": "x"}]}, "messages[0].role", "found 'judge'"),
        ({"messages": []}, "messages", "at least 1"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": 3}, "stop", "a list of strings"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"max_tokens": 10**9}, "max_tokens", "leaves room for"),
        ({"tools": [{}]}, "tools", "does not support it"),
        ({"generation_config": '{"top_k": -5}'}, "generation_config.top_k", "greater than"),
    ],
)
def test_an_error_names_the_field(server, error_of, fields, param, said):
    error = error_of(server, **fields)
    assert error["param"] == param and said in error["message"] and error["message"].startswith(param)


def test_a_body_with_another_content_type(server):
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}'
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        error = post(server, body, **{"content-type": kind}).json()["error"]
        assert error["message"] == f"the Content-Type is {kind!r}, expected application/json"
        assert error["param"] is None
    broken = post(server, body[:-1] + b",}").json()["error"]
    assert broken["message"].startswith("the body is not JSON: ") and broken["param"] is None


def test_one_model_by_its_name_and_monitors(server):
    assert server.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        server.client.models.retrieve("huge")
    assert error.value.code == "model_not_found"
    reply = httpx.head(f"{server.url}/health")
    assert reply.status_code == 200 and not reply.content


def test_pages_of_allowed_origins_may_use_the_server(serving):
    page, other = "https://chat.example", "https://evil.example"
    with serving(cors_origins=[page], api_key="k") as server:
        headers = {"origin": page, "access-control-request-method": "POST"}
        headers["access-control-request-headers"] = "authorization,content-type"
        reply = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
        assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == page
        refused = httpx.get(f"{server.url}/v1/models", headers={"origin": page})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == page
        assert (
            "access-control-allow-origin"
            not in httpx.get(f"{server.url}/health", headers={"origin": other}).headers
        )


@pytest.mark.parametrize("where", ["content", "url"])
def test_json_nested_deeply(server, where):
    body = json.dumps(ASK).replace('"hi"', "[" * 200_000 if where == "content" else '{"url":' * 100_000)
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
