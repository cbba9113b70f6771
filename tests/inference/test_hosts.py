"""Chat, inspect and serve with a stock model that has MoE layers."""

import json

import pytest
import torch
from PIL import Image

from unimoe.commands import main as cli
from unimoe.errors import UserError
from unimoe.inference.conversation import Conversation, Settings
from unimoe.model.loading import load_any, load_model
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig
from unimoe.moe.hf import takes_sentinels
from unimoe.moe.view import view
from unimoe.serve.batch import RunningBatch, can_batch
from unimoe.testing_hosts import FAMILIES, MIXTURES, inputs, question


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("host")
    model, processor = FAMILIES["qwen2_5_vl"][0]()
    torch.manual_seed(0)
    upcycle_model(model, MoEConfig.for_upcycling({"experts": {"copies": 3}}))
    model.save_pretrained(out)
    processor.save_pretrained(out)
    Image.new("RGB", (28, 56), "red").save(out / "red.png")
    return out


def test_a_conversation_equals_generate(folder):
    talk = Conversation(*load_any(folder, device="cpu"), Settings(max_new_tokens=3))
    talk.attach("image", str(folder / "red.png"), "!image")
    words: list[str] = []
    answer = talk.ask("what is it?", words.append)
    assert "".join(words).strip() == answer
    assert talk.stats.tokens()["image"] == 2
    model, ours = talk.model, talk.processor
    with Image.open(folder / "red.png") as image:
        asked = [{"role": "user", "content": [{"type": "image", "image": image.convert("RGB")},
                                              {"type": "text", "text": "what is it?"}]}]  # fmt: skip
        batch = inputs(ours.processor, asked)
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert ours.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer
    with pytest.raises(UserError, match="holds a model of type 'qwen2_5_vl', expected 'unimoe'"):
        load_model(folder)


def test_inspect_shows_its_parts_and_the_load_of_its_experts(folder, capsys):
    media = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "what?"}]
    row = {"messages": [{"role": "user", "content": media}, {"role": "assistant", "content": "red"}]}
    (folder / "data.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main(["inspect", str(folder), str(folder / "data.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["parameters"]["parts"]) == {"language model", "visual", "experts", "routers"}
    assert found["moe"]["layers"] == [0] and found["tokens"]["image"] == 2


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_transformers_talk_and_are_inspected(name, tmp_path, capsys):
    built = MIXTURES[name]()
    for part in built:
        part.save_pretrained(tmp_path)
    Image.new("RGB", (28, 56), "red").save(tmp_path / "red.png")
    talk = Conversation(*load_any(tmp_path, device="cpu"), Settings(max_new_tokens=3))
    assert all(takes_sentinels(layer.experts) for layer in view(talk.model)), "a skipped expert costs nothing"
    talk.attach("image", str(tmp_path / "red.png"), "!image")
    asked = [{"role": "user", "content": [{"type": "image", "image": Image.open(tmp_path / "red.png")},
                                          {"type": "text", "text": "what is it?"}]}]  # fmt: skip
    batch = inputs(built[1], asked)
    ids = built[0].generate(**batch, max_new_tokens=3, do_sample=False)[0, batch["input_ids"].shape[1] :]
    expected = built[1].tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert talk.ask("what is it?", lambda _: None) == expected
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["moe"]["layers"] == ([1] if name == "glm4v_moe" else [0, 1])
    assert len(found["moe"]["experts"]) == 4 and found["moe"]["experts_per_token"] == 2
    sizes = found["parameters"]
    assert sizes["total"] - sizes["active"] == sizes["parts"]["experts"] / 2 > 0
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}))
    assert cli.main(["inspect", str(tmp_path), str(tmp_path / "data.jsonl"), "--json"]) == 0
    load = json.loads(capsys.readouterr().out)["load"]
    assert load["layers"] == found["moe"]["layers"] and len(load["text"][0]) == 4
    assert talk.stats.expert_load()["layers"] == load["layers"] and talk.stats.tokens()["image"] > 0


BATCHED = ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "qwen2_5_omni", *MIXTURES]


@pytest.mark.parametrize("name", BATCHED)
@torch.inference_mode()
def test_a_running_batch_gives_what_generate_gives(name):
    model, processor = MIXTURES[name]() if name in MIXTURES else FAMILIES[name][0]()
    asked = [question("image"), question(), question("image", "image")]
    rows = [inputs(processor, one) for one in asked][: 3 if can_batch(model) else 1]
    batch, said = RunningBatch(model), []
    for row in rows:
        prompt = batch.prompt(row)
        _, logits_V = prompt.advance(256)
        batch.join(prompt)
        assert logits_V is not None
        said.append([int(logits_V.argmax())])
    for _ in range(3):
        for row, logits_V in zip(said, batch.step([row[-1] for row in said]), strict=True):
            row.append(int(logits_V.argmax()))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "suppress_tokens": None}
    model.generation_config.eos_token_id = None
    for row, found in zip(rows, said, strict=True):
        for owner in (model, model.model):
            if hasattr(owner, "rope_deltas"):
                owner.rope_deltas = None
        assert model.generate(**row, **settings)[0, -4:].tolist() == found
