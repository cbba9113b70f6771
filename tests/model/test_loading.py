"""Finished models: what is found, and what is refused in one line."""

import json

import pytest
from safetensors.torch import load_file, save_file

from unimoe.errors import UserError
from unimoe.model.loading import find_model, load_model, open_processor
from unimoe.testing import IMAGE, save_tiny_llm, tiny_model


@pytest.fixture
def folder(tmp_path):
    """A finished dense model."""
    model, processor = tiny_model(tmp_path / "parts", image=IMAGE)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{folder}/config.json", "is a file; expected the folder of a finished stage"),
        ("{folder}/nothing", "does not exist; expected the folder of a finished stage"),
        ("{folder}/../parts/llm", "holds a model of type 'llama', expected 'unimoe'"),
        ("{folder}/..", "has no config.json"),
    ],
)
def test_what_is_no_model_is_named(folder, model, message):
    with pytest.raises(UserError, match=f"MODEL .*{message}"):
        find_model(model.format(folder=folder))


def test_weights_that_do_not_fit_the_configuration_are_named(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.language_model.norm.weight"
    save_file({key: tensor for key, tensor in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"1 missing keys, such as {name}"):
        load_model(folder, device="cpu", hub=False)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="MODEL .* cannot be loaded: "):
        load_model(folder, device="cpu", hub=False)


def test_an_expert_is_no_model(tmp_path):
    (tmp_path / "expert.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="holds one expert, not a model; put it into one with"):
        load_model(tmp_path)


def test_for_an_llm_alone_every_medium_is_one_token(tmp_path):
    processor = open_processor(str(save_tiny_llm(tmp_path)))
    content = [{"type": "image", "path": "nowhere.png"}, {"type": "audio", "path": "nowhere.wav"}]
    ids = processor.encode([{"role": "user", "content": content}])["input_ids"]
    tokens = processor.tokenizer.convert_tokens_to_ids(["<image>", "<audio>"])
    assert [ids.count(token) for token in tokens] == [1, 1]
