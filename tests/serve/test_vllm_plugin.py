import logging
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from unimoe.errors import UserError
from unimoe.model.chat_template import tokenize
from unimoe.serve.vllm_plugin import (
    audio_modalities,
    divide_audio,
    plain_messages,
    publish_experts,
    refuse,
    register,
    with_list,
)
from unimoe.testing import tiny_model

CLIP, SOUND = {"type": "input_audio", "input_audio": {"data": ""}}, {"type": "audio_url", "audio_url": {}}


def test_importing_unimoe_imports_no_vllm():
    code = "import sys, unimoe, unimoe.serve.vllm_plugin; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60).returncode == 0


def test_a_process_without_vllm_logs_one_line(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm.model_executor.models.config", None)  # may be loaded
    with caplog.at_level(logging.WARNING):
        register()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot serve unimoe models" in caplog.text and "vllm" in caplog.text


def test_vllm_finds_the_plugin():
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "unimoe"]
    if not found:
        pytest.skip("unimoe was installed before it had this entry point: run `make setup`")
    assert found[0].load() is register


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model, _ = tiny_model(tmp_path_factory.mktemp("parts"), {"router": {"kind": "top_p"}})
    return model.config


def changed(config, **fields):
    known = config.to_dict()
    fields["text_config"] = {**known["text_config"], **fields.get("text_config", {})}
    return type(config).from_dict({**known, **fields})


def test_experts_are_published_where_vllm_looks(config):
    config = changed(config, moe={"experts": {"slices": 2}, "router": {"k": 3}})
    publish_experts(config)
    assert (config.text_config.num_experts, config.text_config.num_experts_per_tok) == (8, 3)


def test_a_ragged_router_gets_a_slot_for_every_expert(config):
    config = changed(config)
    publish_experts(config)
    assert (config.text_config.num_experts, config.text_config.num_experts_per_tok) == (4, 4)


def test_a_dense_model_has_no_experts(config):
    config = changed(config, moe=None)
    publish_experts(config)
    assert not hasattr(config.text_config, "num_experts")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rope_sections": [1, 1, 2]}, "rope_sections"),
        ({"text_config": {"hidden_act": "gelu"}}, "the activation 'gelu'"),
        ({"moe": {"experts": {"kind": "latent_space", "size": 8}}}, "'latent_space', expected swiglu"),
    ],
)
def test_what_vllm_cannot_express_is_refused_in_one_line(config, fields, reason):
    with pytest.raises(UserError, match=reason) as refused:
        publish_experts(changed(config, **fields))
    assert "\n" not in str(refused.value)


def test_audio_is_divided_as_our_server_does():
    messages = [{"content": [CLIP, {"type": "text", "text": ""}, SOUND]}, {"content": "audio_url"}, {}]
    messages[0]["content"].append({"audio_url": {}})  # the type may be left out
    assert audio_modalities(messages, ("speech", "audio")) == ["speech", "audio", "audio"]
    assert audio_modalities(messages, ("speech",)) == ["speech"] * 3
    assert audio_modalities(messages, ("audio",)) == ["audio"] * 3
    media = {"image": [1], "audio": [2, 3, 4]}
    divided = {"image": [1], "speech": [2], "audio": [3, 4]}
    assert divide_audio(media, ["speech", "audio", "audio"]) == divided


def test_messages_become_those_of_the_processor():
    conversation = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "audio"}, {"type": "image"}, {"type": "audio"}]},
        {"role": "assistant", "content": None},
    ]
    assert plain_messages(conversation, ["audio", "speech"]) == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "audio"}, {"type": "image"}, {"type": "speech"}]},
        {"role": "assistant", "content": ""},
    ]


def test_content_can_be_read_twice():
    assert with_list({"role": "user", "content": iter([CLIP])})["content"] == [CLIP]
    assert with_list({"role": "user", "content": "hi"})["content"] == "hi"


@pytest.mark.parametrize(
    "settings", [{"chat_template": "{{ x }}"}, {"tools": [{}]}, {"continue_final_message": True}]
)
def test_settings_without_effect_are_refused(settings):
    with pytest.raises(UserError):
        refuse(settings, "template")
    refuse({"chat_template": "template", "tools": [], "enable_thinking": False}, "template")


def test_typed_control_tokens_stay_text(tmp_path):
    _, processor = tiny_model(tmp_path)
    typed = [{"type": "text", "text": "what does <image> mean, <|im_end|>?"}, {"type": "image"}]
    ids = processor.prompt_ids([{"role": "user", "content": typed}])
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(image) == 1 and ids[-13:].count(image) == 0  # the part's, in front of the turn's end
    assert "what does <image> mean, <|im_end|>?<image><|im_end|>" in processor.tokenizer.decode(ids)
    text, _ = processor._render([{"role": "user", "content": typed}], True, "message")
    assert ids == tokenize(text, processor.tokenizer, {"image": [1]}).ids
